# A loop device on one machine: full copy, checkpoints, restores, and the bus.
{
  nodes.machine.imports = [ ./common/single.nix ];

  testScript = "dispatcher = agent = machine\n" + builtins.readFile ./common/script.py + ''
    machine.start()
    make_loop()
    put_known_key()
    start("/dev/loop0")
    more_checkpoints(3)
    compare_newest(3)

    # The units are the project's own, and started under the names the bus knows.
    for role in ["agent", "dispatcher"]:
        unit = machine.succeed(f"systemctl cat blxrep-{role}")
        assert "CapabilityBoundingSet=" in unit, unit
        machine.succeed(f"systemctl cat dbus-org.blxrep.{role.capitalize()}.service")
        machine.succeed(f"systemctl reload blxrep-{role}")
        machine.wait_for_unit(f"blxrep-{role}")
        machine.succeed(f"busctl introspect org.blxrep.{role.capitalize()} /org/blxrep/Manager")
    machine.succeed("stat -c %a /run/credentials/blxrep-agent.service/key | grep -x 400")

    call = "busctl call org.blxrep.Dispatcher /org/blxrep/Manager org.blxrep.Manager"
    assert "/org/blxrep/disk/web1/" in machine.succeed(f"{call} Pause 'sa{{sv}}' web1 0")
    machine.succeed(f"{call} Resume 'sa{{sv}}' web1 0")
    more_checkpoints(1)
    machine.succeed("systemctl stop writers")
    newest = checkpoints()[-1]["checkpoint"]
    target = "/var/lib/blxrep-dispatcher/back.img"
    machine.succeed(f"{call} Restore 'sssa{{sv}}' web1 {newest} {target} 0")
    machine.wait_for_file(target)
    assert digest(machine, target) == photo(newest)
    machine.succeed("blxctl status", "blxctl verify --agent web1 latest")
  '';
}
