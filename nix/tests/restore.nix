# A checkpoint back over the network: the agent fetches it from the dispatcher, to a file and onto a free disk.
{
  imports = [ ./common/pair.nix ];

  nodes.agent.virtualisation.emptyDiskImages = [{
    size = 128;
    driveConfig.deviceExtraOpts.serial = "spare";
  }];

  testScript = builtins.readFile ./common/script.py + ''
    start_all()
    enroll()
    start("/dev/disk/by-id/virtio-data")
    more_checkpoints(2)
    rows = checkpoints()
    for target in ["/var/restored.img", "/dev/disk/by-id/virtio-spare"]:
        for row in rows[-2:]:
            agent.succeed(f"blxctl restore {row['checkpoint']} {target}")
            assert digest(agent, target) == photo(row["checkpoint"]), (target, row)
            agent.succeed("rm -f /var/restored.img")
    # A line that says so keeps an agent from it, and only from that.
    dispatcher.succeed("sed -i 's/$/ no-restore/' /var/lib/blxrep-dispatcher/agents")
    agent.fail("blxctl restore latest /var/never.img")
    agent.fail("test -e /var/never.img")
    more_checkpoints(1)
    compare_newest(1)
  '';
}
