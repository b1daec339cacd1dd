# The basic scenario on each kernel series that nixpkgs has (the long-term ones, and the newest): one machine each.
{ lib, hostPkgs, ... }:

let
  # 5.15 is the oldest that blxrep supports. A series that was removed is still named, and throws.
  wanted = name: packages:
    let
      series = builtins.match "linux_([0-9]+)_([0-9]+)" name;
    in
    series != null && lib.versionAtLeast (lib.concatStringsSep "." series) "5.15" && (builtins.tryEval packages.kernel.outPath).success;
  series = lib.attrNames (lib.filterAttrs wanted hostPkgs.linuxKernel.packages);
in
{
  nodes = lib.genAttrs series (name: { pkgs, ... }: {
    imports = [ ./common/single.nix ];
    boot.kernelPackages = pkgs.linuxKernel.packages.${name};
  });

  testScript = "dispatcher = agent = machines[0]\n" + builtins.readFile ./common/script.py + ''
    def scenario(machine):
        global agent, dispatcher
        dispatcher = agent = machine
        machine.start()
        print(machine.succeed("uname -r"))
        make_loop()
        put_known_key()
        start("/dev/loop0")
        more_checkpoints(3)
        compare_newest(3)
        machine.shutdown()


    for kernel in machines:
        scenario(kernel)
  '';
}
