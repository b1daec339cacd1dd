//! What `--help` says below the options: examples, exit codes, and what `--json` prints.

pub(crate) const HELP: &str = "\
AGENT may be left out on an agent, and on a dispatcher that has only one. Commands about an agent take it as an \
argument; restore and verify, which are about a checkpoint, take --agent; mount and export need it in any case. Times are in UTC.

Examples:
  blxctl status                                   is every disk protected?
  blxctl show web1                                which checkpoints are there?
  blxctl restore --agent web1 latest web1.img     bring the newest one back
  blxctl mount web1 latest /mnt/web1              look into it without that
  blxctl pause web1                               send nothing for now

Exit codes:
  0  done
  1  failed, or canceled
  2  wrong usage
  3  no daemon runs, it refused, access was denied, or agent and dispatcher are not
     connected
  4  damage was found, or a checkpoint did not boot
  5  not found: no such agent, disk, checkpoint or job
  6  only of 'status': something needs attention

JSON:
  --json  one document on standard output, or one a line of 'watch'; sizes in bytes
          (_bytes), times and spans in microseconds (_usec) or milliseconds (_ms), null
          for what is not known. Errors stay text on standard error.

Environment:
  DBUS_SYSTEM_BUS_ADDRESS  another bus than the system's

Files:
  /usr/share/polkit-1/actions/org.blxrep.policy
          the polkit actions: inspect, pause, checkpoint and restore";

pub(crate) const STATUS: &str = "\
A disk is protected if its newest checkpoint is at most two intervals and a minute old. An agent does not know the \
interval: there, any checkpoint will do while agent and dispatcher are connected and nothing is paused. EXPOSED is what \
changed since the newest checkpoint: what a disaster now would cost.

'scrub' is the dispatcher's check of everything it stores: how far it is, when it last came to its end, and what it, or a \
verify, found damaged and was not found sound since.

Examples:
  blxctl status
  blxctl --role agent status
  blxctl status --json | jq '.daemons[].disks[] | select(.protected | not)'

Exit codes:
  0  every disk is protected and nothing is wrong
  3  no daemon runs
  6  something needs attention: a disk is unprotected, late, failed, detached, fuzzy,
     paused, damaged in the store or has an error, an agent has never shown one or is refused, or there is no
     disk

JSON:
  ok       whether the exit code is 0
  daemons  an array: role, bus_name, version, disks_total, disks_protected,
           disks_attention, agents_without_disks, agents_refused (agent, message, advice),
           targets_unfinished (agent, message, advice),
           disks as of 'disks' with protected and problems (kind, message, advice) added,
           scrub (every_usec, progress, began_usec, last_began_usec, last_ended_usec, damaged;
           null on an agent),
           jobs as of 'jobs'";

pub(crate) const AGENTS: &str = "\
Examples:
  blxctl agents

JSON:
  an array  agent, connected, hostname, version, address, last_seen_usec (since 1970; null
            if never), disks (how many), refused (why a machine of this name is; else null)";

pub(crate) const DISKS: &str = "\
Examples:
  blxctl disks
  blxctl disks web1 --json

JSON:
  an array  agent, disk (its id), device, size_bytes, state (detached, paused, copying,
            comparing, syncing, idle or failed), paused, paused_by (agent, dispatcher),
            progress (0 to 1, of a copy or compare), dirty_bytes, last_checkpoint, lag_usec
            (its age), consistency, sync_every_usec (0 on an agent), last_error, damage (an
            array: what of it is stored damaged)";

pub(crate) const SHOW: &str = "\
Examples:
  blxctl show
  blxctl show web1 --disk sda --start 202611210000

JSON:
  an array  checkpoint, agent, disk, device, time (RFC 3339), consistency, size_bytes,
            delta_bytes, stored_bytes, parent (null for the base), freeze_ms,
            unreadable_blocks (zeros: the agent's disk could not read them), note, boot (passed or
            failed; null if nobody has tried), boot_time (RFC 3339)";

pub(crate) const RESTORE: &str = "\
TARGET is opened with your own rights, and every block is verified. A new file is made under a hidden name and gets its own when \
it is whole; nothing that exists is overwritten. A block device must not be in use; one that holds a file system, a partition \
table, LVM, md or encryption is refused unless it is named twice, see --overwrite. Ctrl-C cancels and waits until the daemon has \
cleaned up; a second one leaves.

On an agent: --agent may name another one whose disks the dispatcher lets this one restore. Only what a device does not hold \
already is sent, and a restore that was interrupted goes on when it is begun again.

With --format qcow2 (only on the dispatcher, whole disks, new files) 'qemu-img', which must be in PATH, reads an export of the checkpoint \
and writes the image, and then compares the two. The export checks every block it gives, by its hash; what is damaged elsewhere is not looked for.

With --no-wait nobody would be left to give a new file its name: the daemon itself makes it, and must be able to write there.

Examples:
  blxctl restore --agent web1 latest web1.img
  blxctl restore --agent web1 --disk sda 202611212034 /dev/sdb
  blxctl restore --agent web1 --partition 2 latest root.img
  blxctl restore --agent web1 --format qcow2 latest web1.qcow2
  blxctl restore latest /dev/sdb2 --partition 2 --overwrite /dev/sdb2

Exit codes:
  0  done, and every byte is right; blocks that the agent's disk could not read are zeros,
     and are named on standard error
  4  damage was found; nothing is left, except on a device
  5  no such agent, disk or checkpoint

JSON:
  job, type, result  result: done, canceled or failed
  of what is done    checkpoint, disk, consistency, note, output, size_bytes,
                     written_bytes, unreadable_blocks, unreadable_sectors; of qcow2 neither
                     written_bytes nor unreadable_sectors
  of a failure       error, message, damage";

pub(crate) const VERIFY: &str = "\
Every file is read once, however many of the checkpoints rest on it. The dispatcher does the same by itself, slowly: see \
'blxctl status'.

With --boot it is not read but started in QEMU, without a network, as by 'blxctl boot': the first login prompt on the serial \
console (the machine needs 'console=ttyS0') passes. With --probe a line 'blxrep-probe: ok' does, and 'blxrep-probe: ' with \
anything else fails: let a service of yours that looks deeper print it to /dev/ttyS0. What the console showed is kept in the dispatcher's \
data directory, boot/AGENT/DISK/CHECKPOINT.boot, and 'show' tells the result.

Examples:
  blxctl verify --agent web1 latest
  blxctl verify --agent web1 --disk sda 20261121203456 20261121204056
  blxctl verify --agent web1 --start 202611210000
  blxctl verify --all                             everything of everybody
  blxctl verify --boot --agent web1
  blxctl verify --boot --agent web1 --probe --boot-timeout 120 latest -- -m 8G

Exit codes:
  0  sound; blocks that the agent's disk could not read are named on standard error
  4  damage was found, and is listed; or it did not boot

JSON:
  job, type, result  result: done, canceled or failed
  of what is done    damage (empty if sound), verified (an array, one a disk: agent, disk,
                     oldest, newest, checkpoints, damaged, first_damaged (all behind it
                     rest on it), unreadable (how many have zeros for blocks that could
                     not be read))
  of one checkpoint  checkpoint, disk, unreadable_blocks, unreadable_sectors as well
  of a failure       error, message, damage
  of --boot          only agent, disk, checkpoint, boot (passed or failed), reason (null if
                     passed), seconds, console (its text)";

pub(crate) const BOOT: &str = "\
A copy of the machine as it was, on this host, in QEMU, with your rights and without a network. What it writes is thrown away, \
and nothing stored is changed. Its serial console is your terminal: Ctrl-A X ends it, Ctrl-A H helps. A machine whose kernel \
has no 'console=ttyS0' shows its boot loader at most: give it a screen. The agent's other disks are there as well, as of \
their newest checkpoint that is no newer.

It starts by BIOS, with 2 CPUs, 2 GiB and KVM where there is KVM. What stands behind -- is QEMU's, and wins.

Needs qemu-system-x86_64 in PATH, and room in /var/tmp for what the machine writes.

Examples:
  blxctl boot web1 latest
  blxctl boot web1 202611212034 --disk sda -- -m 8G -smp 4
  blxctl boot web1 latest -- -display gtk
  blxctl boot web1 latest -- -bios /usr/share/ovmf/OVMF.fd        a UEFI machine
  blxctl boot web1 latest -- -nic user,model=virtio               a network, by NAT

JSON:
  nothing: standard output is the machine's console";

pub(crate) const MOUNT: &str = "\
DIR gets disk.img, and partN.img for each partition. All of it is read-only, and every block is verified when it is read; one that \
is damaged is an input/output error, and the dispatcher's journal names the file. Needs root. The mount outlives this command: \
'blxctl umount DIR' ends it. Canceling its job, or a stop of the dispatcher, makes every read fail, and leaves DIR to be unmounted.

A checkpoint of class filesystem or application has clean journals. Of another one:
  mount -o loop,ro,noload DIR/part1.img /mnt         ext4, without its journal
  mount -o loop,ro,norecovery DIR/part1.img /mnt     xfs, without its log
or export it with --writable and let the journal be replayed there.

Examples:
  blxctl mount web1 latest /mnt/web1
  mount -o loop,ro /mnt/web1/part1.img /mnt/files

JSON:
  job, agent, disk, checkpoint, consistency, note, warnings (an array), target";

pub(crate) const UMOUNT: &str = "\
Needs root. What is mounted of its files must be unmounted first.

Examples:
  blxctl umount /mnt/web1

JSON:
  umounted  the directory";

pub(crate) const EXPORT: &str = "\
Speaks NBD, to 16 clients at most: nbdcopy, qemu-img, QEMU, nbd-client. Read-only, unless --writable: then what clients write goes into a \
temporary file that is thrown away. A unix socket is only for you and root. Who reaches a TCP address can read the whole disk, and nothing \
is encrypted: name an address that only the right ones reach.

Goes on until Ctrl-C or 'blxctl cancel'. With --no-wait only until 'blxctl cancel', and the socket's file is left to be removed.

Examples:
  blxctl export web1 latest --socket /run/web1.sock
  nbdcopy 'nbd+unix:///?socket=/run/web1.sock' web1.img
  qemu-img convert -O qcow2 'nbd+unix:///?socket=/run/web1.sock' web1.qcow2
  blxctl export web1 latest --writable --tcp 127.0.0.1:10809

JSON:
  job, agent, disk, checkpoint, consistency, note, warnings (an array), target, uri; when
  it begins";

pub(crate) const SYNC: &str = "\
Canceling only ends the wait: what was ordered may still come.

With --compare the whole disk is read and compared with what is stored, and only what differs is sent, before the checkpoint \
is taken: for who does not trust the tracking.

Examples:
  blxctl sync
  blxctl sync web1 --disk sda --compare

JSON:
  job, type, result  result: done, canceled or failed
  of what is done    checkpoints (an object: disk to checkpoint)
  of a failure       error, message";

pub(crate) const ACCEPT: &str = "\
An agent that was put back from an old image, or two machines with one key (a clone), show up as a machine that is refused: \
see 'blxctl agents'. Accept it if it is the right one: it goes on when it asks next, within 75 s, and any other machine of that \
name is refused from then on. Its disks are compared; no checkpoint is changed. A clone is not to be accepted: enroll it under a name of its own.

With --disk: accepts that a disk shrank or was replaced by another one.

Examples:
  blxctl accept web1
  blxctl accept web1 --disk sda

JSON:
  agent, disk (null for the machine), accepted (true)";

pub(crate) const PAUSE: &str = "\
Changes are tracked on, and are sent after 'resume'. It stays paused over restarts of both sides.

Examples:
  blxctl pause web1
  blxctl pause web1 --disk sda

JSON:
  changed  the disks that were not paused on this side yet, as of 'disks'";

pub(crate) const RESUME: &str = "\
A disk is sent again when neither side pauses it.

Examples:
  blxctl resume web1
  blxctl resume web1 --disk sda

JSON:
  changed  the disks that were paused on this side, as of 'disks'";

pub(crate) const JOBS: &str = "\
Examples:
  blxctl jobs

JSON:
  an array  job, type (sync, restore, verify, mount or export), agent, disk (null for several), checkpoint,
            target, started_by_uid, started_by, state (running or canceling), progress (0 to
            1), bytes_done, bytes_total, rate_bytes_per_s";

pub(crate) const CANCEL: &str = "\
Asks the job to end, and does not wait for that.

Examples:
  blxctl cancel 7

JSON:
  job    its number
  state  canceling";

pub(crate) const WATCH: &str = "\
Goes on, also while the daemon is away, until Ctrl-C.

Examples:
  blxctl watch
  blxctl watch --json | jq -r 'select(.event == \"checkpoint\") | .checkpoint'

JSON:
  every line   time (RFC 3339), role, event
  checkpoint   agent, disk, checkpoint
  disk         agent, disk, state, last_error
  disk_gone    agent, disk
  job_began    job
  job_ended    job, result, message
  daemon_gone  nothing else
  daemon_back  nothing else";
