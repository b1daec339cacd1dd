# What the module makes of configurations, with the lib of nixpkgs and what pkgs.nix and nixos.nix put in the place of the rest.
#   good: facts, each of which must be true; bad: configurations that must not evaluate, and the option each error names
#   files: for tools/nix-check to look at with other programs
{ lib ? import ./lib }:

let
  pkgs = import ./pkgs.nix { inherit lib; system = "x86_64-linux"; };
  evaluate = config: (lib.evalModules {
    modules = [ ../module.nix ./nixos.nix { _module.args = { inherit pkgs; }; } { services.blxrep = config; } ];
  }).config.checked;

  agent = more: {
    agent = lib.recursiveUpdate
      {
        enable = true;
        keyFile = "/run/secrets/key";
        settings = { id = "web1"; dispatcher-addr = "backup:8080"; device = "/dev/sda"; };
      }
      more;
  };
  dispatcher = more: { dispatcher = { enable = true; } // more; };
  hash = "blake3:" + lib.concatStrings (lib.replicate 64 "0");

  only-agent = evaluate (agent { });
  only-dispatcher = evaluate (dispatcher { });
  both = evaluate (agent { } // dispatcher { openFirewall = true; settings.sync-freq = "30s"; });
  neither = evaluate { };
  much = evaluate (
    agent { hooks.dump = "/bin/dump"; settings = { state-dir = "/srv/state"; device = [ "/dev/sda" "/dev/sdb" ]; read-rate-mib = 50; }; }
    // dispatcher {
      agents = { web1.keyHash = hash; web2 = { keyHash = hash; mayRestore = false; }; };
      openFirewall = true;
      settings = { data-dir = "/srv/blxrep"; listen = "[::]:9000"; new-key = 1; };
    }
  );

  file = config: config.environment.etc."blxrep/config.yaml".source;
  yaml = config: builtins.fromJSON (builtins.readFile (file config).unchecked);
  service = config: name: config.systemd.services."blxrep-${name}";
  shipped = name: builtins.readFile (../../systemd + "/blxrep-${name}.service");

  # The keys of one role's section of the example that is installed.
  example = role:
    let
      section = lib.last (lib.splitString "# --- ${role} -" (builtins.readFile ../../systemd/config.example.yaml));
      lines = lib.splitString "\n" (lib.head (lib.splitString "\n# ---" section));
    in
    lib.concatLists (lib.filter (match: match != null) (map (builtins.match "#?([a-z-]+): .*") lines));
  typed = role: lib.attrNames (import ../settings.nix { inherit lib; }).${role};

  documented = lib.filter (option: option.visible && !option.internal && option.loc != [ "_module" "args" ])
    (lib.optionAttrSetToDocList (lib.evalModules {
      modules = [ ../module.nix { _module.args = { inherit pkgs; }; _module.check = false; } ];
    }).options);
  options = map (option: option.name) documented;
in
{
  good = {
    "a host without blxrep has nothing of it" =
      neither.systemd.services == { } && neither.environment.etc == { } && neither.users.users == { } && neither.systemd.packages == [ ];

    "the agent alone: its keys, and those that the module sets" = yaml only-agent == {
      id = "web1";
      dispatcher-addr = "backup:8080";
      device = [ "/dev/sda" ];
      key-file = "/run/credentials/blxrep-agent.service/key";
    };
    "the dispatcher alone" = yaml only-dispatcher == {
      data-dir = "/var/lib/blxrep-dispatcher";
      agents-file = "/var/lib/blxrep-dispatcher/agents";
    };
    "both roles share one file" = yaml both == yaml only-agent // yaml only-dispatcher // { sync-freq = "30s"; };
    "keys without a type go to the file" = (yaml much).new-key == 1;
    "the program checks the file for each role that is on" =
      let says = role: lib.hasInfix "/bin/blxrep check-config --mode ${role} --config $unchecked\n" (file much).text;
      in says "agent" && says "dispatcher" && !lib.hasInfix "agent" (file only-dispatcher).text;

    "the units are the package's, and only what they cannot know is set" =
      lib.attrNames (service only-agent "agent").serviceConfig == [ "LoadCredential" ]
      && (service only-dispatcher "dispatcher").serviceConfig == { }
      && only-agent.systemd.packages == only-agent.services.dbus.packages
      && lib.elem (lib.head only-agent.systemd.packages) only-agent.environment.systemPackages;
    "the key is a credential" = (service only-agent "agent").serviceConfig.LoadCredential == "key:/run/secrets/key";
    "aliases and targets are those of the shipped units" = lib.all
      (name:
        let unit = service both name; in
        lib.all (alias: lib.hasInfix "\nAlias=${alias}\n" (shipped name)) unit.aliases && lib.length unit.aliases == 1
        && lib.all (target: lib.hasInfix "\nWantedBy=${target}\n" (shipped name)) unit.wantedBy && lib.length unit.wantedBy == 1)
      [ "agent" "dispatcher" ];
    "another state directory is thawed as well" = lib.any
      (lib.hasSuffix "/bin/blxrep thaw --state-dir /srv/state")
      (service much "agent").serviceConfig.ExecStopPost;
    "another data directory is made and opened" =
      (service much "dispatcher").serviceConfig.ReadWritePaths == [ "/srv/blxrep" ]
      && much.systemd.tmpfiles.rules == [ "d /srv/blxrep 0750 blxrep blxrep -" ];
    "another setting restarts only its own role" =
      let
        triggers = name: config: (service config name).restartTriggers;
        other = evaluate (agent { } // dispatcher { openFirewall = true; settings.sync-freq = "40s"; });
      in
      triggers "agent" both == triggers "agent" other && triggers "dispatcher" both != triggers "dispatcher" other;

    "agents in the configuration make the agents file" =
      builtins.readFile (yaml much).agents-file == "web1 ${hash}\nweb2 ${hash} no-restore\n";
    "hooks make a directory" = lib.hasSuffix "-blxrep-hooks" (yaml much).hooks-dir;
    "the firewall stays shut unless asked" =
      only-dispatcher.networking.firewall.allowedTCPPorts == [ ]
      && both.networking.firewall.allowedTCPPorts == [ 8080 ]
      && much.networking.firewall.allowedTCPPorts == [ 9000 ];
    "only the dispatcher has a user" = only-agent.users.users == { } && only-dispatcher.users.users.blxrep.isSystemUser;

    "every key of the example has a type, and no other" = lib.all
      (role: lib.sort lib.lessThan (example role) == lib.sort lib.lessThan (typed role)) [ "agent" "dispatcher" ];
    "every option is described" =
      lib.all (option: (option.description or null) != null) documented
      && lib.all (name: lib.elem "services.blxrep.${name}" options) [
        "package"
        "agent.enable"
        "agent.keyFile"
        "agent.hooks"
        "agent.settings"
        "agent.settings.device"
        "dispatcher.agents"
        "dispatcher.agents.<name>.keyHash"
        "dispatcher.openFirewall"
      ];
  };

  # Each gives an error that has the option's name in it: the text before the colon of its own name.
  bad = lib.mapAttrs (_: config: (file (evaluate config)).outPath) {
    "services.blxrep.agent.keyFile: needed" = { agent = { enable = true; settings = (agent { }).agent.settings; }; };
    "services.blxrep.agent.keyFile: in the store" = agent { keyFile = "${builtins.storeDir}/key"; };
    "services.blxrep.agent.keyFile: a path, which would be copied" = agent { keyFile = ./cases.nix; };
    "services.blxrep.agent.settings.id: needed" = {
      agent = { enable = true; keyFile = "/k"; settings = { dispatcher-addr = "h:1"; device = "/dev/sda"; }; };
    };
    "services.blxrep.agent.settings.id: a path" = agent { settings.id = "../x"; };
    "services.blxrep.agent.settings.device: none" = agent { settings.device = [ ]; };
    "services.blxrep.agent.settings.device: no path" = agent { settings.device = "sda"; };
    "services.blxrep.agent.settings.dispatcher-addr: no TLS" = agent { settings.dispatcher-addr = "ws://h:1"; };
    "services.blxrep.agent.settings.block-size: no power of two" = agent { settings.block-size = 1000; };
    "services.blxrep.agent.settings.state-dir: a space" = agent { settings.state-dir = "/srv/my state"; };
    "services.blxrep.agent.settings.key-file: beside keyFile" = agent { settings.key-file = "/other"; };
    "services.blxrep.agent.settings.new-key: a function" = agent { settings.new-key = _: 1; };
    "services.blxrep.agent.hooks.dump: no path" = agent { hooks.dump = "dump"; };
    "services.blxrep.dispatcher.agents.web1.keyHash: a key" = dispatcher { agents.web1.keyHash = "blxrep1:web1:00:00"; };
    "services.blxrep.dispatcher.agents: a name with a slash" = dispatcher { agents."../x".keyHash = hash; };
    "services.blxrep.dispatcher.settings.agents-file: beside agents" =
      dispatcher { agents.web1.keyHash = hash; settings.agents-file = "/etc/agents"; };
    "services.blxrep.dispatcher.settings.listen: no port" = dispatcher { settings.listen = "0.0.0.0"; };
    "services.blxrep.dispatcher.settings.sync-freq: a word" = dispatcher { settings.sync-freq = "soon"; };
    "services.blxrep.dispatcher.nosuch: not known" = dispatcher { nosuch = 1; };
  };

  # What systemd and blxrep are to accept: both roles on one host, with everything set.
  files = {
    "config.yaml" = builtins.readFile (file much).unchecked;
    agents = builtins.readFile (yaml much).agents-file;
  } // lib.genAttrs [ "blxrep-agent.service" "blxrep-dispatcher.service" ] (unit: much.systemd.services.${lib.removeSuffix ".service" unit}.text);
}
