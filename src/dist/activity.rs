//! What a rank is doing, in words, for the messages of ranks that wait for it.

use super::Collective;
use std::cell::RefCell;
use std::sync::{Mutex, PoisonError};

/// What the process's rank was last said to do; its heartbeats carry it.
static PROCESS: Mutex<Activity> = Mutex::new(Activity::NONE);

thread_local! {
    static OWN: RefCell<Own> = const { RefCell::new(Own { what: String::new(), main: 0 }) };
}

/// What the rank of a thread does: something, and a part of it.
struct Own {
    what: String,
    /// Bytes of the words without the part.
    main: usize,
}

/// What a rank does.
#[derive(Clone, Debug, Default)]
pub(super) struct Activity {
    pub what: String,
    /// Others wait for it, however long it takes.
    pub alone: bool,
}

impl Activity {
    const NONE: Activity = Activity {
        what: String::new(),
        alone: false,
    };

    /// Of the process.
    pub fn of_process() -> Self {
        let activity = PROCESS.lock().unwrap_or_else(PoisonError::into_inner);
        activity.clone()
    }
}

/// Says what the rank of this thread does from now on, such as "gradients of step 12".
pub fn doing(what: impl Into<String>) {
    begin(what.into(), false);
}

/// The same of work that takes this rank long while others may wait: no limit of time applies to it.
pub fn doing_alone(what: impl Into<String>) {
    begin(what.into(), true);
}

/// Says which part of it comes next, such as "weights"; of several ranks alone, where words are worth their time.
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
    set(Own { what, main });
}

fn set(own: Own) {
    let mut process = PROCESS.lock().unwrap_or_else(PoisonError::into_inner);
    process.what.clone_from(&own.what);
    OWN.set(own);
}

fn begin(what: String, alone: bool) {
    let main = what.len();
    set(Own { what, main });
    let mut process = PROCESS.lock().unwrap_or_else(PoisonError::into_inner);
    process.alone = alone;
}

/// What the rank of this thread was last said to do.
pub(super) fn current<R>(read: impl FnOnce(&str) -> R) -> R {
    OWN.with_borrow(|own| read(&own.what))
}
