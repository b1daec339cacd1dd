# 'sudo nix run .#demo': tools/demo, with what it calls.
{ lib, writeShellApplication, blxrep, coreutils, diffutils, e2fsprogs, gnused, jq, kmod, util-linux, xfsprogs }:

writeShellApplication {
  name = "blxrep-demo";
  runtimeInputs = [ coreutils diffutils e2fsprogs gnused jq kmod util-linux xfsprogs ];
  text = ''
    exec bash ${../tools/demo} ${lib.getExe blxrep} "$@"
  '';
}
