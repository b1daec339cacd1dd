# The keys of config.yaml that each role knows, with their types; the names are those of the file. A key that is not here goes to the file
# as it is: 'blxrep check-config' judges the whole of it when the system is built.
{ lib }:

let
  inherit (lib) mkOption types;

  needed = type: description: mkOption { inherit type description; };
  key = type: description: mkOption {
    type = types.nullOr type;
    default = null;
    inherit description;
  };

  # Paths come into unit files as they are.
  path = types.strMatching "/[^[:space:]%\"'$\\]*";
  time = types.either types.ints.positive (types.strMatching "[0-9][0-9a-z ]*");
  powersOfTwo = map (shift: lib.foldl' (n: _: n * 2) 1 (lib.range 1 shift)) (lib.range 9 20);
in
{
  agent = {
    id = needed (types.strMatching "[A-Za-z0-9][A-Za-z0-9._-]{0,63}") "This agent's id, as it was enrolled.";
    dispatcher-addr = needed (types.strMatching "(wss://)?[^/@]+:[0-9]+/?") "Where the dispatcher listens, HOST:PORT.";
    device = needed
      (types.coercedTo path lib.singleton (types.nonEmptyListOf path))
      "The whole disks to replicate, such as /dev/sda (not partitions): one, or a list.";
    key-file = needed path "The agent's key, as the service sees it: set by `keyFile`.";
    state-dir = key path "What must outlive the agent (/var/lib/blxrep if it is not set).";
    hooks-dir = key path "Executables called around a freeze: set by `hooks`, if there are any.";
    freeze-timeout = key time "The longest a file system stays frozen: seconds, or with a unit (10s if it is not set).";
    hook-timeout = key time "The longest one hook may run: seconds, or with a unit (10s if it is not set).";
    block-size = key (types.enum powersOfTwo) "Bytes of a tracked block (4096 if it is not set). Only before the first full copy.";
    read-rate-mib = key types.ints.positive "The most MiB read from a disk in a second; without it, reading is only as fast as sending.";
  };

  dispatcher = {
    data-dir = mkOption {
      type = path;
      default = "/var/lib/blxrep-dispatcher";
      description = "Everything is kept here. Another directory than the default is made, and opened to the service.";
    };
    agents-file = mkOption {
      type = path;
      default = "/var/lib/blxrep-dispatcher/agents";
      description = "The agents that may connect; 'blxrep enroll' adds them. Set by `agents`, if there are any.";
    };
    sync-freq = key time "Time between checkpoints: minutes, or with a unit (5m if it is not set).";
    scrub-every = key (types.either (types.enum [ "never" ]) time)
      "The time in which everything stored is read and checked once: days, or with a unit, or never (30d if it is not set).";
    scrub-rate-mib = key types.ints.positive "The most MiB that this reads in a second (50 if it is not set).";
    listen = key (types.strMatching ".+:[0-9]+") "Address and port to listen on (0.0.0.0:8080 if it is not set).";
  };
}
