# Two machines: a dispatcher, and an agent with a disk that is not its root. Nothing is enrolled yet, and the agent waits for its key.
{
  nodes.dispatcher = { pkgs, ... }: {
    environment.systemPackages = [ pkgs.jq ];
    # Room for what the writers make of it, in MiB.
    virtualisation.diskSize = 4096;
    services.blxrep.dispatcher = {
      enable = true;
      openFirewall = true;
      settings.sync-freq = "5s";
    };
  };

  nodes.agent = {
    imports = [ ./agent.nix ];
    virtualisation.emptyDiskImages = [{
      # MiB.
      size = 128;
      driveConfig.deviceExtraOpts.serial = "data";
    }];
    services.blxrep.agent.settings = {
      dispatcher-addr = "dispatcher:8080";
      device = "/dev/disk/by-id/virtio-data";
    };
  };
}
