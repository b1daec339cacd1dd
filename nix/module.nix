# services.blxrep.agent and services.blxrep.dispatcher: the project's own units, bus policy and polkit actions, with a configuration made
# here. A unit says here only what it cannot know by itself.
{ config, lib, pkgs, ... }:

let
  inherit (lib) mkIf mkOption types;

  cfg = config.services.blxrep;
  yaml = pkgs.formats.yaml { };
  keys = import ./settings.nix { inherit lib; };
  program = lib.getExe cfg.package;

  role = name: {
    enable = lib.mkEnableOption "the blxrep ${name}";

    settings = mkOption {
      type = types.submodule {
        freeformType = yaml.type;
        options = keys.${name};
      };
      default = { };
      description = ''
        Keys of the configuration file, /etc/blxrep/config.yaml. It is readable by everybody: nothing secret belongs here.
        The program checks it when the system is built.
      '';
    };
  };

  given = lib.filterAttrs (_: value: value != null);
  enabled = lib.filter (name: cfg.${name}.enable) [ "agent" "dispatcher" ];
  # One file for both roles, where 'blxrep enroll' and the others look for it as well. No key belongs to two roles.
  unchecked = yaml.generate "blxrep.yaml" (lib.mergeAttrsList (map (name: given cfg.${name}.settings) enabled));
  checked = pkgs.runCommand "blxrep-config.yaml" { inherit unchecked; } (
    # What is built for another machine cannot be run by this one.
    lib.optionalString (pkgs.stdenv.buildPlatform.canExecute pkgs.stdenv.hostPlatform)
      (lib.concatMapStrings (name: "${program} check-config --mode ${name} --config $unchecked\n") enabled)
    + "cp $unchecked $out\n"
  );

  unit = name: bus: {
    wantedBy = [ "multi-user.target" ];
    # What the bus starts it by (the unit's Alias=, which NixOS does not read).
    aliases = [ "dbus-${bus}.service" ];
    # A restart loses nothing, and takes every key.
    restartTriggers = [ (builtins.toJSON (given cfg.${name}.settings)) ];
  };

  dataDir = cfg.dispatcher.settings.data-dir;
  agentLine = id: agent: "${id} ${agent.keyHash}${lib.optionalString (!agent.mayRestore) " no-restore"}\n";
in
{
  options.services.blxrep = {
    package = mkOption {
      type = types.package;
      default = pkgs.callPackage ./package.nix { };
      defaultText = lib.literalExpression "pkgs.callPackage ./package.nix { }";
      description = "The blxrep package, for both roles.";
    };

    agent = role "agent" // {
      keyFile = mkOption {
        type = types.strMatching "/.*";
        example = "/run/secrets/blxrep-key";
        description = ''
          The file with the line that 'blxrep enroll' printed: a string, so that it is not copied into the Nix store. The
          service gets it by LoadCredential=, so only root has to be able to read it.
        '';
      };

      hooks = mkOption {
        type = types.attrsOf types.path;
        default = { };
        example = lib.literalExpression ''
          { postgresql = pkgs.writeShellScript "checkpoint" '''
              [ "$1" = pre-freeze ] && exec ''${pkgs.util-linux}/bin/runuser -u postgres -- psql -c CHECKPOINT
            '''; }
        '';
        description = ''
          Executables called around a freeze in the order of their names, with one argument: pre-freeze, frozen or post-thaw.
        '';
      };
    };

    dispatcher = role "dispatcher" // {
      agents = mkOption {
        type = types.attrsOf (types.submodule {
          options.keyHash = mkOption {
            type = types.strMatching "blake3:[0-9a-f]{64}";
            description = "The hash of the agent's key: the second word of the line that 'blxrep enroll' adds to an agents file.";
          };
          options.mayRestore = mkOption {
            type = types.bool;
            default = true;
            description = "Whether the agent may fetch its own checkpoints back.";
          };
        });
        default = { };
        example = { web1.keyHash = "blake3:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"; };
        description = ''
          The agents that may connect, by id. If there are any, no others may: agents that were enrolled by hand are cut off.
        '';
      };

      openFirewall = mkOption {
        type = types.bool;
        default = false;
        description = "Whether to open the port of `settings.listen`.";
      };
    };
  };

  config = lib.mkMerge [
    (mkIf (enabled != [ ]) {
      environment.systemPackages = [ cfg.package ];
      environment.etc."blxrep/config.yaml".source = checked;
      systemd.packages = [ cfg.package ];
      services.dbus.packages = [ cfg.package ];
    })

    (mkIf cfg.agent.enable {
      assertions = [
        {
          assertion = !lib.hasPrefix builtins.storeDir cfg.agent.keyFile;
          message = "services.blxrep.agent.keyFile: everybody can read the Nix store; name a file outside of it";
        }
      ];

      services.blxrep.agent.settings = {
        key-file = "/run/credentials/blxrep-agent.service/key";
        hooks-dir = mkIf (cfg.agent.hooks != { }) "${pkgs.linkFarm "blxrep-hooks" cfg.agent.hooks}";
      };

      systemd.services.blxrep-agent = unit "agent" "org.blxrep.Agent" // {
        # lsblk and blkid, and what hooks call.
        path = [ pkgs.util-linux ];
        serviceConfig = {
          LoadCredential = "key:${cfg.agent.keyFile}";
        } // lib.optionalAttrs (cfg.agent.settings.state-dir != null) {
          # The empty string resets the unit's own.
          ExecStopPost = [ "" "${program} thaw --state-dir ${cfg.agent.settings.state-dir}" ];
        };
      };
    })

    (mkIf cfg.dispatcher.enable {
      assertions = [
        {
          assertion = lib.all (id: builtins.match "[A-Za-z0-9][A-Za-z0-9._-]{0,63}" id != null) (lib.attrNames cfg.dispatcher.agents);
          message = "services.blxrep.dispatcher.agents: an agent's id is 1 to 64 letters, digits, '.', '_' and '-', a letter or digit first";
        }
      ];

      services.blxrep.dispatcher.settings.agents-file = mkIf (cfg.dispatcher.agents != { })
        "${pkgs.writeText "blxrep-agents" (lib.concatStrings (lib.mapAttrsToList agentLine cfg.dispatcher.agents))}";

      # Not by the package's own sysusers.d and tmpfiles.d: a host with only the agent has no such user.
      users.users.blxrep = {
        isSystemUser = true;
        group = "blxrep";
        home = dataDir;
      };
      users.groups.blxrep = { };
      systemd.tmpfiles.rules = [ "d ${dataDir} 0750 blxrep blxrep -" ];

      systemd.services.blxrep-dispatcher = unit "dispatcher" "org.blxrep.Dispatcher" // {
        # blkid.
        path = [ pkgs.util-linux ];
        # The unit's StateDirectory= opens the default one.
        serviceConfig = lib.optionalAttrs (dataDir != "/var/lib/blxrep-dispatcher") { ReadWritePaths = [ dataDir ]; };
      };

      networking.firewall.allowedTCPPorts = mkIf cfg.dispatcher.openFirewall [
        (lib.toInt (lib.last (lib.splitString ":" (given cfg.dispatcher.settings).listen or "0.0.0.0:8080")))
      ];
    })
  ];
}
