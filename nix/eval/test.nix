# Of the NixOS test driver, what the tests set.
{ config, lib, hostPkgs, ... }:

let
  inherit (lib) mkOption types;
  node = types.submoduleWith { modules = [ ./nixos.nix config.defaults { _module.args.pkgs = hostPkgs; } ]; };
  machine = _: node: builtins.deepSeq
    [ (lib.mapAttrs (_: service: service.text) node.checked.systemd.services) (lib.mapAttrs (_: file: "${file.source}") node.environment.etc) ]
    node.boot.kernelPackages;
in
{
  options = {
    name = mkOption { type = types.str; };
    defaults = mkOption { type = types.deferredModule; default = { }; };
    nodes = mkOption { type = types.lazyAttrsOf node; };
    testScript = mkOption { type = types.str; };
    driver = mkOption { type = types.raw; readOnly = true; };
  };
  config.driver = hostPkgs.drv config.name { inherit (config) testScript; nodes = lib.mapAttrs machine config.nodes; };
}
