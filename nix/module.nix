# services.blxrep.agent and services.blxrep.dispatcher: the project's own units, with a configuration made here.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  cfg = config.services.blxrep;
  yaml = pkgs.formats.yaml { };

  role = name: {
    enable = lib.mkEnableOption "the blxrep ${name}";

    settings = lib.mkOption {
      type = yaml.type;
      default = { };
      description = ''
        Keys of the configuration file; 'blxrep start --help' lists them. It comes to lie in the world-readable Nix
        store: nothing secret belongs here.
      '';
    };
  };

  # The package's unit says /bin/kill, which is not there.
  reload = [
    ""
    "${pkgs.coreutils}/bin/kill -HUP $MAINPID"
  ];

  # The unit is the package's; only its command and its credentials are set here. The empty string resets the unit's own.
  exec = name: settings: [
    ""
    "${lib.getExe cfg.package} start --mode ${name} --config ${yaml.generate "blxrep-${name}.yaml" settings}"
  ];
in
{
  options.services.blxrep = {
    package = lib.mkOption {
      type = lib.types.package;
      default = pkgs.callPackage ./package.nix { };
      defaultText = lib.literalExpression "pkgs.callPackage ./package.nix { }";
      description = "The blxrep package.";
    };

    agent = role "agent" // {
      keyFile = lib.mkOption {
        type = lib.types.nullOr (lib.types.strMatching "/.*");
        default = null;
        example = "/run/secrets/blxrep-key";
        description = ''
          The file with the line that 'blxrep enroll' printed, as a string, so that it is not copied into the store. The
          service gets it by LoadCredential=.
        '';
      };
    };

    dispatcher = role "dispatcher" // {
      openFirewall = lib.mkOption {
        type = lib.types.bool;
        default = false;
        description = "Whether to open the port of `settings.listen` (8080 if it is not set).";
      };
    };
  };

  config = lib.mkMerge [
    (lib.mkIf (cfg.agent.enable || cfg.dispatcher.enable) {
      environment.systemPackages = [ cfg.package ];
      systemd.packages = [ cfg.package ];
      services.dbus.packages = [ cfg.package ];
    })

    (lib.mkIf cfg.agent.enable {
      assertions = [
        {
          assertion = cfg.agent.settings ? key-file;
          message = "services.blxrep.agent.keyFile: needed; it names the file with the agent's key";
        }
        {
          assertion = cfg.agent.keyFile == null || !lib.hasPrefix builtins.storeDir cfg.agent.keyFile;
          message = "services.blxrep.agent.keyFile: everyone can read the Nix store; name a file outside of it";
        }
      ];

      services.blxrep.agent.settings = lib.mkIf (cfg.agent.keyFile != null) {
        key-file = "/run/credentials/blxrep-agent.service/key";
      };

      systemd.services.blxrep-agent = {
        wantedBy = [ "multi-user.target" ];
        # What the bus starts it by (the unit's Alias=, which NixOS does not read).
        aliases = [ "dbus-org.blxrep.Agent.service" ];
        # lsblk and blkid, and what hooks call.
        path = [ pkgs.util-linux ];
        serviceConfig = {
          ExecStart = exec "agent" cfg.agent.settings;
          ExecReload = reload;
        }
        // lib.optionalAttrs (cfg.agent.keyFile != null) {
          LoadCredential = "key:${cfg.agent.keyFile}";
        };
      };
    })

    (lib.mkIf cfg.dispatcher.enable {
      services.blxrep.dispatcher.settings = {
        data-dir = lib.mkDefault "/var/lib/blxrep-dispatcher";
        agents-file = lib.mkDefault "/var/lib/blxrep-dispatcher/agents";
      };

      users.users.blxrep = {
        isSystemUser = true;
        group = "blxrep";
        home = "/var/lib/blxrep-dispatcher";
      };
      users.groups.blxrep = { };

      # Not by the package's own tmpfiles.d: on a host with only the agent its user does not exist.
      systemd.tmpfiles.rules = [ "d /var/lib/blxrep-dispatcher 0750 blxrep blxrep -" ];

      systemd.services.blxrep-dispatcher = {
        wantedBy = [ "multi-user.target" ];
        aliases = [ "dbus-org.blxrep.Dispatcher.service" ];
        serviceConfig = {
          ExecStart = exec "dispatcher" cfg.dispatcher.settings;
          ExecReload = reload;
        };
      };

      networking.firewall = lib.mkIf cfg.dispatcher.openFirewall {
        allowedTCPPorts = [
          (lib.toInt (lib.last (lib.splitString ":" (cfg.dispatcher.settings.listen or "0.0.0.0:8080"))))
        ];
      };
    })
  ];
}
