{
  description = "blxrep: live replication of disks over the network, for disaster recovery";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs = { nixpkgs, ... }:
    let
      inherit (nixpkgs) lib;
      forAllSystems = f: lib.genAttrs [ "x86_64-linux" "aarch64-linux" ] (system: f nixpkgs.legacyPackages.${system});
      blxrep = pkgs: pkgs.callPackage ./nix/package.nix { };
    in
    {
      packages = forAllSystems (pkgs: {
        default = blxrep pkgs;
        options-doc = import ./nix/options-doc.nix { inherit lib pkgs; };
      });

      apps = forAllSystems (pkgs: {
        demo = {
          type = "app";
          program = lib.getExe (pkgs.callPackage ./nix/demo.nix { blxrep = blxrep pkgs; });
        };
      });

      nixosModules.default.imports = [ ./nix/module.nix ];

      overlays.default = final: _: { blxrep = blxrep final; };

      checks = forAllSystems (pkgs: import ./nix/checks.nix { inherit lib pkgs; });

      devShells = forAllSystems (pkgs: { default = import ./nix/shell.nix { inherit pkgs; }; });

      formatter = forAllSystems (pkgs: pkgs.nixpkgs-fmt);
    };
}
