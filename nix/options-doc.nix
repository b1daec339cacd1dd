# The options of services.blxrep as Markdown, made of the module itself.
{ lib, pkgs }:

let
  # The module says what it sets of NixOS' own options, which are not there.
  evaluated = lib.evalModules {
    modules = [ ./module.nix { _module.args = { inherit pkgs; }; _module.check = false; } ];
  };
in
(pkgs.nixosOptionsDoc { options.services.blxrep = evaluated.options.services.blxrep; }).optionsCommonMark
