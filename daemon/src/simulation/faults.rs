//! What breaks, and when it is mended.

use super::dispatcher::Dispatcher;
use super::world::{Event, World};
use crate::agent::action::Input;
use crate::bitmap::BlockSet;
use crate::geometry::Geometry;
use crate::store::simfiles::Loss;

/// Something that breaks, or is mended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// One of those below, and again some time later.
    Any {
        /// How long it is calm between two, on average.
        calm_ms: u64,
    },
    /// The connection breaks.
    Cut,
    /// Nothing crosses the network for some time.
    Partition,
    /// The agent's process is killed and started again.
    AgentDies,
    /// The agent's machine loses its power; it comes back.
    PowerCut,
    PowerBack,
    /// The dispatcher is killed, or its machine dies, and comes back.
    DispatcherDies,
    DispatcherBack,
    /// The same, in the middle of what the store does next.
    DispatcherDiesSoon,
    /// The dispatcher's disk fails once.
    StoreFails,
    /// The dispatcher's disk is full; somebody makes room.
    StoreFull,
    StoreFree,
    /// The agent's clock is set.
    ClockJumps,
    /// A write that the tracker missed, and knows that it missed something.
    Unseen,
    /// The disk grows or shrinks.
    Resize,
    /// Sectors of the disk go bad; they can be read again.
    Spoil,
    Mend,
    /// A person pauses or resumes.
    Pause,
    /// Programs write much, or little.
    Load,
}

const ANY: [Fault; 15] = [
    Fault::Cut,
    Fault::Cut,
    Fault::Partition,
    Fault::AgentDies,
    Fault::PowerCut,
    Fault::DispatcherDies,
    Fault::DispatcherDiesSoon,
    Fault::StoreFails,
    Fault::StoreFull,
    Fault::ClockJumps,
    Fault::Unseen,
    Fault::Resize,
    Fault::Spoil,
    Fault::Pause,
    Fault::Load,
];

impl World {
    pub(super) fn fault(&mut self, fault: Fault) {
        self.note(|| format!("-- {fault:?}"));
        match fault {
            Fault::Any { calm_ms } => {
                let wait = self.random.between(1, 2 * calm_ms);
                self.after(wait, Event::Fault(fault));
                if self.is_faulty {
                    let which = self.random.below(ANY.len() as u64) as usize;
                    self.fault(ANY[which]);
                }
            }
            Fault::Cut => self.cut(),
            Fault::Partition => {
                self.partition_until_ms = self.now_ms + self.random.between(10, 8000);
                if self.random.once_in(2) {
                    self.cut();
                }
            }
            Fault::AgentDies => {
                if self.machine.is_on {
                    self.cut();
                    self.machine.restart_agent();
                    self.agent_begins();
                }
            }
            Fault::PowerCut => self.power_cut(),
            Fault::PowerBack => {
                self.machine.is_on = true;
                self.agent_begins();
            }
            Fault::DispatcherDies => self.dispatcher_dies(),
            Fault::DispatcherBack => self.dispatcher_back(),
            Fault::DispatcherDiesSoon => self.files.stop_soon(self.random.below(20)),
            Fault::StoreFails => self.files.fail_soon(self.random.below(20)),
            Fault::StoreFull => {
                self.files.set_full(true);
                let wait = self.random.between(10, 6000);
                self.after(wait, Event::Fault(Fault::StoreFree));
            }
            Fault::StoreFree => self.files.set_full(false),
            Fault::ClockJumps => {
                let days = self.random.below(5) as i64 - 2;
                self.wall_offset_ms += days * 86_400_000 + self.random.below(3_600_000) as i64 - 1_800_000;
            }
            Fault::Unseen => {
                let blocks = self.machine.write_unseen(&mut self.random);
                self.oracle.allowed_blocks += blocks;
            }
            Fault::Resize => self.resize(),
            Fault::Spoil => {
                // A compare tells of them; and of what can be read again.
                self.oracle.allowed_blocks += 2 * self.machine.spoil(&mut self.random);
                let wait = self.random.between(10, 20_000);
                self.after(wait, Event::Fault(Fault::Mend));
            }
            Fault::Mend => self.machine.bad = BlockSet::new(),
            Fault::Pause => self.pause(!self.machine.is_paused),
            Fault::Load => self.write_every_ms = 5 << self.random.below(8),
        }
    }

    fn agent_begins(&mut self) {
        let life = self.machine.life;
        self.after(1, Event::Tick(life));
        let wait = self.random.between(1, 500);
        self.after(wait, Event::Connect(life));
    }

    fn resize(&mut self) {
        if !self.machine.is_on {
            return;
        }
        self.cut();
        let size_bytes = (self.random.between(1, 5) << 20) + 512 * self.random.below(9);
        let geometry = Geometry::new(size_bytes, self.machine.geometry().block_shift()).unwrap();
        // What was staged for a disk of another size is sent again.
        self.oracle.allowed_blocks += self.machine.resize(geometry) + geometry.blocks();
        self.agent_begins();
    }

    fn power_cut(&mut self) {
        if !self.machine.is_on {
            return;
        }
        self.cut();
        self.oracle.allowed_blocks += self.machine.lose_power(&mut self.random);
        self.machine.is_on = false;
        let wait = self.random.between(10, 4000);
        self.after(wait, Event::Fault(Fault::PowerBack));
    }

    fn dispatcher_dies(&mut self) {
        if !self.dispatcher.is_up {
            return;
        }
        let loss = match self.random.below(3) {
            0 => Loss::Nothing,
            1 => Loss::All,
            _ => Loss::Seed(self.random.next()),
        };
        self.note(|| format!("dispatcher dies: {loss:?}"));
        self.files.crash(loss);
        self.dispatcher.is_up = false;
        self.dispatcher.link = None;
        self.cut();
        self.oracle.check_chain(&self.files);
        let wait = self.random.between(1, 4000);
        self.after(wait, Event::Fault(Fault::DispatcherBack));
    }

    fn dispatcher_back(&mut self) {
        let life = self.dispatcher.life.wrapping_add(1);
        self.dispatcher = Dispatcher::new(&self.files, life, self.now_ms);
        self.after(1, Event::Look(life));
    }

    pub(super) fn pause(&mut self, is_paused: bool) {
        self.machine.is_paused = is_paused;
        self.machine.session.handle(Input::Paused(is_paused));
        self.wake();
    }

    /// Nothing breaks from now on, and what is broken is mended.
    pub(super) fn make_peace(&mut self) {
        self.note(|| "-- peace".to_owned());
        self.is_faulty = false;
        self.files.set_full(false);
        self.files.never_fail();
        self.machine.bad = BlockSet::new();
        if self.machine.is_paused {
            self.pause(false);
        }
    }
}
