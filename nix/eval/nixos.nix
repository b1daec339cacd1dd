# Of NixOS, what the module and the tests set, with the types it has there; and what systemd gets of a service.
{ config, extendModules, lib, pkgs, ... }:

let
  inherit (lib) mkOption types;
  option = type: default: mkOption { inherit type default; };
  list = type: option (types.listOf type) [ ];
  anything = option types.anything { };

  setting = with types; nullOr (oneOf [ bool int float str path package ]);
  section = types.attrsOf (types.either setting (types.listOf setting));

  service = types.submodule ({ name, config, ... }: {
    options = {
      aliases = list types.str;
      after = list types.str;
      wantedBy = list types.str;
      path = list types.package;
      restartTriggers = list types.unspecified;
      serviceConfig = option section { };
      script = option types.lines "";
      # The drop-in, as far as it says anything.
      text = mkOption { type = types.str; readOnly = true; };
    };
    config.text =
      let
        lines = lib.mapAttrsToList (key: value: map (value: "${key}=${toString value}\n") (lib.toList value)) config.serviceConfig;
        triggers = lib.optionalString (config.restartTriggers != [ ])
          "[Unit]\nX-Restart-Triggers=${pkgs.writeText name (toString config.restartTriggers)}\n";
        env = lib.optionalString (config.path != [ ]) "Environment=\"PATH=${lib.makeBinPath config.path}\"\n";
      in
      "${triggers}[Service]\n${env}${lib.concatStrings (lib.flatten lines)}";
  });
in
{
  options = {
    assertions = list types.unspecified;
    environment.etc = option (types.attrsOf (types.submodule { options.source = mkOption { type = types.path; }; })) { };
    environment.systemPackages = list types.package;
    networking = {
      firewall.allowedTCPPorts = list types.port;
      primaryIPAddress = option types.str "192.168.1.1";
    };
    security.polkit = { enable = option types.bool false; extraConfig = option types.lines ""; };
    services.dbus.packages = list types.path;
    boot.kernelPackages = anything;
    system.switch.enable = option types.bool false;
    specialisation = option
      (types.attrsOf (types.submodule { options.configuration = option types.deferredModule { }; }))
      { };
    systemd = {
      packages = list types.package;
      services = option (types.attrsOf service) { };
      tmpfiles.rules = list types.str;
    };
    users.users = option
      (types.attrsOf (types.submodule {
        options = {
          isSystemUser = option types.bool false;
          isNormalUser = option types.bool false;
          group = option types.str "";
          home = option types.str "";
        };
      }))
      { };
    users.groups = option (types.attrsOf types.attrs) { };
    virtualisation = {
      emptyDiskImages = list (types.submodule {
        options.size = mkOption { type = types.ints.positive; };
        options.driveConfig.deviceExtraOpts = option (types.attrsOf types.str) { };
      });
      useNixStoreImage = option types.bool false;
      memorySize = option types.ints.positive 1024;
      diskSize = option types.ints.positive 1024;
    };
    # What a build of the system would fail for; else the system.
    checked = mkOption { type = types.attrs; readOnly = true; };
  };

  config.checked =
    let
      failed = map (assertion: assertion.message) (lib.filter (assertion: !assertion.assertion) config.assertions);
      special = specialisation: (extendModules {
        modules = [ specialisation.configuration { specialisation = lib.mkForce { }; } ];
      }).config;
      texts = lib.concatMap (config: map (service: service.text) (lib.attrValues config.systemd.services))
        (map special (lib.attrValues config.specialisation));
    in
    if failed != [ ] then throw "Failed assertions: ${lib.concatStringsSep "; " failed}" else builtins.deepSeq texts config;
}
