# The agent's machine loses its power in mid-write: what its kernel knew of changes is gone, and so is what was not on its disk.
{
  imports = [ ./common/pair.nix ];

  testScript = builtins.readFile ./common/script.py + ''
    start_all()
    enroll()
    start("/dev/disk/by-id/virtio-data")
    more_checkpoints(2)
    for _ in range(3):
        agent.crash()
        before = len(checkpoints())
        agent.start()
        agent.wait_for_unit("multi-user.target")
        agent.succeed("mount /dev/disk/by-id/virtio-data /data && systemctl start writers blxrep-agent")
        more_checkpoints(2)
        assert "tracking began anew" in agent_journal()
        assert len(checkpoints()) > before
        compare_newest(1)
        # The file system that comes back is one that can be mounted.
        dispatcher.succeed(
            f"blxrep dispatcher restore {DATA} --checkpoint latest --output /tmp/restored",
            "e2fsck -fp /tmp/restored || [ $? = 1 ]",
            "rm /tmp/restored",
        )
  '';
}
