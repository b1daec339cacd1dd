# One machine in both roles, with an agent that its configuration lets in, and a loop device to replicate.
{ pkgs, ... }: {
  imports = [ ./agent.nix ];
  environment.systemPackages = [ pkgs.jq ];
  virtualisation.diskSize = 4096;
  services.blxrep = {
    dispatcher = {
      enable = true;
      # The hash of script.py's SECRET.
      agents.web1.keyHash = "blake3:64c5e710067099a23bc9a34b4a944e90fd5eec4788ddfc3c6bb7a8e0a7c6ba69";
      settings = {
        listen = "127.0.0.1:8080";
        sync-freq = "5s";
      };
    };
    agent.settings = {
      dispatcher-addr = "127.0.0.1:8080";
      device = "/dev/loop0";
    };
  };
}
