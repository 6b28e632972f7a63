//! The launcher table under test, and the ways in which the simulator may carry out a launch.

use routegrad::kernels::bindings::*;
use routegrad::kernels::launchers::{self, Counters, Launchers, Options};

/// The simulator's launchers, or those of the instrumented build that ROUTEGRAD_SIM_LIBRARY names.
pub fn table() -> &'static Launchers {
    launchers::sim().unwrap_or_else(|e| panic!("{e}"))
}

/// The build without race detector or address sanitizer. The others are slow: they run the small shapes.
pub fn is_plain() -> bool {
    table().build() == "sim"
}

/// Whether this is the build with the race detector or the address sanitizer. Both see in one run of a kernel what is wrong
/// with it, whatever the schedule, and are slow.
pub fn is_instrumented() -> bool {
    let build = table().build();
    build.starts_with("sim-race") || build.starts_with("sim-asan")
}

/// Runs `body` under other simulator options (they belong to this thread), then puts the old ones back.
pub fn with_options<R>(change: impl FnOnce(&mut Options), body: impl FnOnce() -> R) -> R {
    let before = table().options().expect("a simulator");
    let mut options = before;
    change(&mut options);
    table()
        .set_options(&options)
        .unwrap_or_else(|e| panic!("{e}"));
    let result = body();
    table()
        .set_options(&before)
        .unwrap_or_else(|e| panic!("{e}"));
    result
}

/// What the launches of `body` counted.
pub fn counted(body: impl FnOnce()) -> Counters {
    table().take_counters();
    body();
    table().take_counters().expect("a simulator")
}

/// A way to run a launch: asynchronous effects early, late or anywhere, threads in some order, blocks on some OS threads.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    pub effects: routegrad_sim_async,
    pub order: routegrad_sim_order,
    pub threads: i32,
    pub seed: u64,
}

impl Schedule {
    pub fn run<R>(self, body: impl FnOnce() -> R) -> R {
        let set = |options: &mut Options| {
            options.copies = self.effects as i32;
            options.products = self.effects as i32;
            options.order = self.order as i32;
            options.threads = self.threads;
            options.seed = self.seed;
        };
        with_options(set, body)
    }
}

/// Early, late, last-woken-first, ten at random (two with planted bugs); on one and on two OS threads. In instrumented builds
/// one at random.
pub fn schedules() -> Vec<Schedule> {
    let fixed = |effects, order, threads| Schedule {
        effects,
        order,
        threads,
        seed: 1,
    };
    let random = |seed: u64| Schedule {
        effects: ROUTEGRAD_SIM_RANDOM,
        order: ROUTEGRAD_SIM_SHUFFLED,
        threads: 1 + (seed % 2) as i32,
        seed,
    };
    if is_instrumented() {
        return vec![random(1)];
    }
    let mut all = vec![
        fixed(ROUTEGRAD_SIM_EARLY, ROUTEGRAD_SIM_FIFO, 1),
        fixed(ROUTEGRAD_SIM_LATE, ROUTEGRAD_SIM_FIFO, 1),
        fixed(ROUTEGRAD_SIM_LATE, ROUTEGRAD_SIM_LIFO, 2),
    ];
    let seeds = if is_plain() { 10 } else { 2 };
    all.extend((1..=seeds).map(random));
    all
}
