# Another build of the package on both machines, switched to under running writers: tracking goes on.
let
  # The same programs at another place, which is all that an upgrade is to NixOS.
  upgrade = { pkgs, ... }: {
    system.switch.enable = true;
    specialisation.upgraded.configuration.services.blxrep.package = pkgs.runCommand "blxrep-upgraded"
      {
        old = pkgs.callPackage ../package.nix { };
        meta.mainProgram = "blxrep";
      } ''
      cp -r --no-preserve=ownership $old $out
      chmod -R u+w $out
      find $out/lib $out/share -type f -exec sed -i "s#$old#$out#g" {} +
    '';
  };
in
{
  imports = [ ./common/pair.nix ];

  nodes.dispatcher.imports = [ upgrade ];
  nodes.agent.imports = [ upgrade ];

  testScript = builtins.readFile ./common/script.py + ''
    start_all()
    enroll()
    start("/dev/disk/by-id/virtio-data")
    more_checkpoints(2)
    switch = "/run/current-system/specialisation/upgraded/bin/switch-to-configuration test"
    for machine, unit in [(agent, "blxrep-agent"), (dispatcher, "blxrep-dispatcher")]:
        pid = machine.succeed(f"systemctl show --value -p MainPID {unit}")
        machine.succeed(switch)
        machine.wait_for_unit(unit)
        assert machine.succeed(f"systemctl show --value -p MainPID {unit}") != pid, "not restarted"
        machine.succeed(f"readlink /proc/$(systemctl show --value -p MainPID {unit})/exe | grep upgraded")
        more_checkpoints(2)
        compare_newest(2)
    journal = agent_journal()
    assert "is tracked on, nothing was missed" in journal, journal
  '';
}
