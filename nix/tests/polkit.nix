# Who may do what on the bus: root, and whom a rule of polkit's lets.
{
  nodes.machine = {
    imports = [ ./common/single.nix ];
    users.users.alice.isNormalUser = true;
    users.users.bob.isNormalUser = true;
    security.polkit = {
      enable = true;
      extraConfig = ''
        polkit.addRule(function(action, subject) {
          if (action.id == "org.blxrep.pause" && subject.user == "alice") { return polkit.Result.YES; }
        });
      '';
    };
  };

  testScript = "dispatcher = agent = machine\n" + builtins.readFile ./common/script.py + ''
    machine.start()
    make_loop()
    put_known_key()
    start("/dev/loop0")
    more_checkpoints(1)

    call = "busctl call org.blxrep.Dispatcher /org/blxrep/Manager org.blxrep.Manager"
    pause = f"{call} Pause 'sa{{sv}}' web1 0"
    restore = f"{call} Restore 'sssa{{sv}}' web1 latest /var/lib/blxrep-dispatcher/x.img 0"


    def as_user(user, command):
        return f"runuser -u {user} -- {command}"


    machine.fail(as_user("bob", pause))
    machine.fail(as_user("alice", restore))
    assert "/org/blxrep/disk/web1/" in machine.succeed(as_user("alice", pause))
    machine.fail(as_user("alice", f"{call} Sync 'sa{{sv}}' web1 0"))
    machine.succeed(as_user("alice", f"{call} Resume 'sa{{sv}}' web1 0"))
    machine.succeed(pause.replace("Pause", "Resume"))
    # What there is and how it does is seen by everybody, as with UDisks.
    machine.succeed(as_user("bob", "blxctl status"))
  '';
}
