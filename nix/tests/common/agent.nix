# A machine with an agent that the test starts, a hook that photographs each checkpoint, and writers to start. The disk is mounted on /data.
{ lib, pkgs, ... }: {
  services.blxrep.agent = {
    enable = true;
    keyFile = "/var/lib/blxrep-key";
    settings = {
      id = "web1";
      # A virtual machine may have slow disks.
      freeze-timeout = "60s";
      hook-timeout = "60s";
    };
    hooks.photograph = pkgs.writeShellScript "photograph" ''
      [ "$1" = frozen ] || exit 0
      mkdir -p /var/photos
      dd if="$BLXREP_DEVICE" bs=4M iflag=direct status=none | sha256sum >"/var/photos/$BLXREP_CHECKPOINT"
    '';
  };
  # The store that is shared with the builder is not root's, and no hook is run that others than root can change.
  virtualisation.useNixStoreImage = true;

  systemd.services.blxrep-agent.wantedBy = lib.mkForce [ ];

  # Files made, changed and removed until it is stopped.
  systemd.services.writers.script = ''
    cd /data
    i=0
    while :; do
      i=$((i + 1))
      n=$((i % 20))
      head -c $((n * 20000 + 100)) /dev/urandom >f$n
      mv f$n g$n
      [ $((i % 7)) != 0 ] || rm -f g$((n / 2))
      sync -f .
      sleep 0.2
    done
  '';
}
