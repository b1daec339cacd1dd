# Every file of tests/ is a test in virtual machines, by its name.
{ lib, pkgs }:

let
  files = lib.filterAttrs (name: kind: kind == "regular" && lib.hasSuffix ".nix" name) (builtins.readDir ./tests);

  check = file: _: lib.nameValuePair (lib.removeSuffix ".nix" file) (pkgs.testers.runNixOSTest {
    name = "blxrep-${lib.removeSuffix ".nix" file}";
    imports = [ (./tests + "/${file}") ];
    defaults.imports = [ ./module.nix ];
  });
in
lib.mapAttrs' check files
