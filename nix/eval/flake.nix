# Stands for nixpkgs where only its lib is at hand (tools/nix-check puts that beside this file): packages that are never built, and as much
# of NixOS as is needed to see what the module makes of a configuration.
{
  outputs = _:
    let
      lib = import ./lib;
    in
    {
      inherit lib;
      legacyPackages = lib.genAttrs [ "x86_64-linux" "aarch64-linux" ] (system: import ./pkgs.nix { inherit lib system; });
    };
}
