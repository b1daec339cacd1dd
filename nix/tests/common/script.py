# What all tests share: it stands before each one's own script. `dispatcher` and `agent` are machines, or both the same one.
import json

DATA = "--agent web1 --data-dir /var/lib/blxrep-dispatcher"
SECRET = "07" * 32


def put_key(key):
    """Puts the agent's key where its service takes it from."""
    agent.succeed(f"install -m 600 /dev/null /var/lib/blxrep-key && echo '{key}' >/var/lib/blxrep-key")


def enroll():
    """Enrolls the agent on the dispatcher, as README says."""
    dispatcher.wait_for_unit("blxrep-dispatcher")
    put_key(dispatcher.succeed("runuser -u blxrep -- blxrep enroll web1").strip())


def put_known_key():
    """Gives the agent the key whose hash is in the configuration. Only the certificate is not known before."""
    dispatcher.wait_for_unit("blxrep-dispatcher")
    refused = dispatcher.fail("runuser -u blxrep -- blxrep enroll web2 2>&1")
    assert "read-only" in refused, refused
    scratch = "runuser -u blxrep -- blxrep enroll web2 --agents-file /var/lib/blxrep-dispatcher/scratch"
    fingerprint = dispatcher.succeed(scratch).strip().split(":")[3]
    put_key(f"blxrep1:web1:{SECRET}:{fingerprint}")


def make_loop():
    """The loop disk of a single machine: /dev/loop0, as it is the first one."""
    agent.succeed("truncate -s 128M /var/disk && [ $(losetup --find --show /var/disk) = /dev/loop0 ]")


def start(device):
    """Makes a file system on the disk, writes to it from now on, and starts the agent."""
    agent.succeed(f"mkfs.ext4 -q {device} && mkdir -p /data && mount {device} /data")
    agent.succeed("systemctl start writers blxrep-agent")
    agent.wait_for_unit("blxrep-agent")


def checkpoints():
    status, out = dispatcher.execute(f"blxrep dispatcher show {DATA} --json")
    return json.loads(out) if status == 0 else []


def more_checkpoints(count):
    """Waits until there are so many checkpoints more than now."""
    wanted = len(checkpoints()) + count
    dispatcher.wait_until_succeeds(f"[ $(blxrep dispatcher show {DATA} --json | jq length) -ge {wanted} ]")


def photo(checkpoint):
    """The digest of what the disk was when it was frozen."""
    return agent.succeed(f"cat /var/photos/{checkpoint}").split()[0]


def digest(machine, path):
    return machine.succeed(f"sha256sum <{path}").split()[0]


def compare_newest(count):
    """Restores the newest checkpoints: each must be what the disk was."""
    rows = checkpoints()[-count:]
    assert len(rows) == count, rows
    for row in rows:
        assert row["consistency"] == "application", row
        restore = f"blxrep dispatcher restore {DATA} --checkpoint {row['checkpoint']} --output /tmp/restored"
        dispatcher.succeed(restore)
        restored = digest(dispatcher, "/tmp/restored")
        dispatcher.succeed("rm /tmp/restored")
        assert restored == photo(row["checkpoint"]), row


def agent_journal():
    """What the agent has said since it was started last."""
    unit = "$(systemctl show --value -p InvocationID blxrep-agent)"
    return agent.succeed(f"journalctl --no-pager -o cat _SYSTEMD_INVOCATION_ID={unit}")
