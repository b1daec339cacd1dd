//! Machines with one name and key, and one dispatcher; every step may be the last one of a session.

use proptest::prelude::*;

use super::*;

/// A machine, and what it is in the middle of.
#[derive(Clone, Default)]
struct Machine {
    /// Durable.
    held: Option<Generation>,
    /// What it was offered in the session that it has, if it is in one.
    session: Option<Generation>,
    /// How often it could attach its disks.
    attached: u32,
}

#[derive(Default)]
struct World {
    ledger: Ledger,
    machines: Vec<Machine>,
    tokens: u8,
    refusals: Vec<(usize, Fenced)>,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    /// The machine says hello; its last session is over, whatever it had come to. The dispatcher writes its ledger.
    Hello,
    /// What the dispatcher wrote was the last thing before a crash: the agent hears nothing.
    HelloUnheard,
    /// The machine keeps what it was offered.
    Keep,
    /// It does, and the dispatcher hears so.
    Confirm,
    /// The session breaks.
    Cut,
}

fn step() -> impl Strategy<Value = Step> {
    use Step::*;
    prop_oneof![Just(Hello), Just(HelloUnheard), Just(Keep), Just(Confirm), Just(Cut)]
}

impl World {
    fn alone() -> Self {
        Self { machines: vec![Machine::default()], ..Self::default() }
    }

    fn step(&mut self, number: usize, step: Step) {
        match step {
            Step::Hello | Step::HelloUnheard => {
                // One session an agent.
                self.machines.iter_mut().for_each(|machine| machine.session = None);
                let shown = self.machines[number].held;
                match decide(&self.ledger, shown) {
                    Ok(_) => {
                        self.tokens += 1;
                        let offer = self.ledger.offer(shown, [self.tokens; 16]);
                        if matches!(step, Step::Hello) {
                            self.machines[number].session = Some(offer);
                        }
                    }
                    Err(fenced) => {
                        self.ledger.refuse(shown.unwrap());
                        self.refusals.push((number, fenced));
                    }
                }
            }
            Step::Keep => {
                let machine = &mut self.machines[number];
                machine.held = machine.session.or(machine.held);
            }
            Step::Confirm => {
                let machine = &mut self.machines[number];
                if let Some(offer) = machine.session {
                    machine.held = Some(offer);
                    if self.ledger.confirm(offer) {
                        machine.attached += 1;
                    }
                }
            }
            Step::Cut => self.machines[number].session = None,
        }
        // The ledger is what its file says.
        self.ledger = self.ledger.to_string().parse().unwrap();
    }

    fn goes_on(&mut self, number: usize) -> bool {
        let before = self.machines[number].attached;
        self.step(number, Step::Hello);
        self.step(number, Step::Confirm);
        self.machines[number].attached > before
    }
}

fn steps(machines: usize) -> impl Strategy<Value = Vec<(usize, Step)>> {
    proptest::collection::vec((0..machines, step()), 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn one_machine_is_never_refused(steps in steps(1)) {
        let mut world = World::alone();
        for (number, step) in steps {
            world.step(number, step);
            prop_assert_eq!(&world.refusals, &[]);
        }
        prop_assert!(world.goes_on(0));
    }

    #[test]
    fn of_copies_only_the_first_to_confirm_goes_on(before in steps(1), after in steps(3), copies in 1usize..3) {
        let mut world = World::alone();
        before.into_iter().for_each(|(number, step)| world.step(number, step));
        // Whoever has not been given anything yet is nobody's copy.
        prop_assume!(world.machines[0].held.is_some());
        world.machines[0].session = None;
        world.machines[0].attached = 0;
        world.machines.resize(copies + 1, world.machines[0].clone());
        for (number, step) in after {
            world.step(number % (copies + 1), step);
            let going_on: Vec<_> = (0..=copies).filter(|m| world.machines[*m].attached > 0).collect();
            prop_assert!(going_on.len() <= 1, "{:?}", going_on);
        }
        let winner = (0..=copies).find(|number| world.machines[*number].attached > 0);
        let goes_on: Vec<_> = (0..=copies).filter(|number| world.goes_on(*number)).collect();
        prop_assert_eq!(goes_on.len(), 1);
        prop_assert!(winner.is_none() || winner == goes_on.first().copied());

        // A person decides for one that was refused: from then on the others are.
        let (chosen, _) = *world.refusals.last().unwrap();
        prop_assert_eq!(world.ledger.accept(), world.machines[chosen].held);
        prop_assert!(world.goes_on(chosen));
        for number in 0..=copies {
            prop_assert_eq!(world.goes_on(number), number == chosen, "{}", number);
        }
    }

    #[test]
    fn a_machine_from_an_old_image_is_refused_until_a_person_accepts_it(mut sessions in 1u8..9, back in 1u8..9) {
        let mut world = World::alone();
        let mut images = vec![];
        while sessions > 0 {
            prop_assert!(world.goes_on(0));
            images.push(world.machines[0].clone());
            sessions -= 1;
        }
        let newest = images.len() - 1;
        let image = newest.saturating_sub(usize::from(back));
        world.machines[0] = images[image].clone();
        prop_assert_eq!(world.goes_on(0), image == newest);
        if image < newest {
            let shown = images[image].held.unwrap().number;
            let highest = images[newest].held.unwrap().number;
            prop_assert_eq!(&world.refusals, &[(0, Fenced::Old { shown, highest })]);
            prop_assert!(world.ledger.accept().is_some());
            prop_assert!(world.goes_on(0));
        }
    }

    #[test]
    fn a_dispatcher_on_an_old_copy_of_its_data_refuses_nobody(before in steps(1), since in steps(1), after in steps(1)) {
        let mut world = World::alone();
        before.into_iter().for_each(|(number, step)| world.step(number, step));
        let copy = world.ledger;
        since.into_iter().for_each(|(number, step)| world.step(number, step));
        world.step(0, Step::Cut);
        world.ledger = copy;
        for (number, step) in after {
            world.step(number, step);
        }
        prop_assert!(world.goes_on(0));
        prop_assert_eq!(&world.refusals, &[]);
    }

    #[test]
    fn texts_are_taken_back_or_refused(text in "[0-9a-f: -]{0,80}", number in 1u64.., token: [u8; 16]) {
        let generation = Generation { number, token };
        prop_assert_eq!(generation.to_string().parse(), Ok(generation));
        if let Ok(parsed) = text.parse::<Generation>() {
            prop_assert_eq!(parsed.to_string(), text.clone());
        }
        let _ = text.parse::<Ledger>();
        let mut ledger = Ledger::default();
        ledger.offer(Some(generation), token);
        ledger.refuse(generation);
        prop_assert_eq!(ledger.to_string().parse(), Ok(ledger));
    }
}

#[test]
fn each_case_has_its_name() {
    let mut ledger = Ledger::default();
    assert_eq!(decide(&ledger, None), Ok(Standing::First));
    let first = ledger.offer(None, [1; 16]);
    assert_eq!(decide(&ledger, None), Ok(Standing::First), "it never kept it");
    assert_eq!(decide(&ledger, Some(first)), Ok(Standing::Known), "it kept it, which was not heard");
    assert!(ledger.confirm(first) && !ledger.confirm(first));
    assert_eq!(decide(&ledger, Some(first)), Ok(Standing::Known));
    assert_eq!(decide(&ledger, None), Ok(Standing::Reinstalled));
    let newer = Generation { number: 2, token: [9; 16] };
    assert_eq!(decide(&ledger, Some(newer)), Ok(Standing::DispatcherBehind));
    assert_eq!(
        decide(&ledger, Some(Generation { number: 1, token: [2; 16] })),
        Err(Fenced::Twin { shown: 1 })
    );
    let second = ledger.offer(Some(first), [2; 16]);
    assert_eq!(decide(&ledger, Some(newer)), Err(Fenced::Twin { shown: 2 }));
    assert!(ledger.confirm(second));
    assert_eq!(decide(&ledger, Some(first)), Err(Fenced::Old { shown: 1, highest: 2 }));
    assert_eq!(ledger.accept(), None, "none was refused");
}

#[test]
fn the_highest_number_is_not_the_end() {
    let mut ledger = Ledger::default();
    let shown = Generation { number: u64::MAX, token: [1; 16] };
    assert_eq!(decide(&ledger, Some(shown)), Ok(Standing::DispatcherBehind));
    let offer = ledger.offer(Some(shown), [2; 16]);
    assert!(ledger.confirm(offer));
    assert_eq!(decide(&ledger, Some(offer)), Ok(Standing::Known));
    assert!(decide(&ledger, Some(shown)).is_err());
}
