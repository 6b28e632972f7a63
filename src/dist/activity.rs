//! Text that says what a rank is doing, for the error messages of ranks that wait for it.

use super::Collective;
use std::cell::RefCell;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What the rank of this process is doing; its heartbeats contain it.
static PROCESS: Mutex<Activity> = Mutex::new(Activity::NONE);

thread_local! {
    static OWN: RefCell<Own> = const { RefCell::new(Own { what: String::new(), main: 0 }) };
}

/// What the rank of a thread is doing: a task and a part of the task.
struct Own {
    what: String,
    /// Length of `what` without the part, in bytes.
    main: usize,
}

/// What a rank is doing.
#[derive(Clone, Debug, Default)]
pub(super) struct Activity {
    pub what: String,
    /// Whether the others wait without a time limit.
    pub alone: bool,
}

impl Activity {
    const NONE: Activity = Activity {
        what: String::new(),
        alone: false,
    };

    /// Returns what the rank of this process is doing.
    pub fn of_process() -> Self {
        process().clone()
    }
}

/// Sets what the rank of this thread is doing from now on, such as "gradients of step 12".
pub fn doing(what: impl Into<String>) {
    begin(what.into(), false);
}

/// Does the same as [`doing`] for long work of this rank alone: the others wait without a time limit.
pub fn doing_alone(what: impl Into<String>) {
    begin(what.into(), true);
}

/// Sets the part of the task that comes next, such as "weights". With one rank it does nothing, to save time.
pub fn at(dist: &dyn Collective, part: impl FnOnce() -> String) {
    if dist.size() == 1 {
        return;
    }
    let (part, what) = (
        part(),
        OWN.with_borrow(|own| own.what[..own.main].to_string()),
    );
    let main = what.len();
    let what = match main {
        0 => part,
        _ => format!("{what}, {part}"),
    };
    process().what.clone_from(&what);
    OWN.set(Own { what, main });
}

fn begin(what: String, alone: bool) {
    *process() = Activity {
        what: what.clone(),
        alone,
    };
    let main = what.len();
    OWN.set(Own { what, main });
}

fn process() -> MutexGuard<'static, Activity> {
    PROCESS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Calls `read` with what the rank of this thread is doing.
pub(super) fn current<R>(read: impl FnOnce(&str) -> R) -> R {
    OWN.with_borrow(|own| read(&own.what))
}
