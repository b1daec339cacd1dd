# A package set of which nothing can be built. Each function does to its arguments what the real one does to them, as far as that can be
# seen without building.
{ lib, system }:

let
  drv = name: attrs: derivation
    {
      inherit name system;
      builder = "/bin/false";
      # Everything that the real one would look at is evaluated.
      args = [ (builtins.toJSON attrs) ];
    } // { meta = { }; };
  program = name: drv name { } // { meta.mainProgram = name; };

  platform = lib.systems.elaborate system;
  programs = lib.genAttrs [
    "btrfs-progs"
    "cargo-deny"
    "clippy"
    "coreutils"
    "dbus"
    "deadnix"
    "diffutils"
    "e2fsprogs"
    "fio"
    "gnused"
    "jq"
    "kmod"
    "libbpf"
    "linuxHeaders"
    "nixpkgs-fmt"
    "rustfmt"
    "shellcheck"
    "util-linux"
    "xfsprogs"
  ]
    program;

  pkgs = programs // {
    inherit lib pkgs;
    callPackage = lib.callPackageWith pkgs;

    stdenv = { buildPlatform = platform; hostPlatform = platform; };
    llvmPackages.clang-unwrapped = program "clang";
    rustPlatform.buildRustPackage = args:
      assert lib.isString args.src.name || args.src ? outPath;
      drv args.pname (removeAttrs args [ "meta" "src" ] // { src = "${args.src}"; }) // args.env // { inherit (args) meta; };

    mkShell = args: drv "shell" args;
    runCommand = name: attrs: text: drv name (attrs // { inherit text; }) // attrs // { inherit text; };
    # One that can be read.
    writeText = name: text: builtins.toFile name (builtins.unsafeDiscardStringContext text);
    writeShellScript = name: text: drv name { inherit text; };
    writeShellApplication = args: drv args.name args // { meta.mainProgram = args.name; };
    linkFarm = name: entries: drv name (lib.mapAttrs (_: entry: "${entry}") entries);
    # JSON is YAML.
    formats.yaml = _: {
      type =
        let
          value = with lib.types; nullOr (oneOf [ bool int float str path (attrsOf value) (listOf value) ]) // { description = "YAML value"; };
        in
        value;
      generate = name: value: pkgs.writeText name (builtins.toJSON value);
    };

    nixosOptionsDoc = { options }: {
      optionsCommonMark = drv "options.md" { text = lib.optionAttrSetToDocList options; };
    };
    testers.runNixOSTest = test: (lib.evalModules {
      modules = [ test ./test.nix { _module.args.hostPkgs = pkgs; } ];
    }).config.driver;

    linuxKernel.packages = lib.genAttrs [ "linux_6_1" "linux_6_12" "linux_hardened" ] (name: { kernel = drv name { }; }) // {
      linux_4_19 = throw "removed";
    };
    inherit drv;
  };
in
pkgs
