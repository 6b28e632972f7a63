//! Converts panics of libraries that read external files into errors.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

thread_local! {
    /// Whether this thread is inside [`catch_panic`].
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Returns the result of `f`, with the text of its error, or the message of its panic, which is then not printed. Use it
/// only for external code on external input: a panic of this crate is a bug and must be visible.
pub(crate) fn catch_panic<T, E: ToString>(f: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = take_hook();
        set_hook(Box::new(move |info| {
            if !GUARDED.get() {
                before(info);
            }
        }));
    });
    let outer = GUARDED.replace(true);
    // The values that `f` borrows or owns are not used after a panic.
    let result = catch_unwind(AssertUnwindSafe(f));
    GUARDED.set(outer);
    let payload = match result {
        Ok(done) => return done.map_err(|e| e.to_string()),
        Err(payload) => payload,
    };
    let text = payload.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| payload.downcast_ref::<&str>().copied());
    let reason = text.unwrap_or("no reason given");
    Err(format!("what its reader fails at ({reason})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_returned_as_its_message() {
        assert_eq!(catch_panic(|| Ok::<_, String>(3)), Ok(3));
        let failed = catch_panic(|| Ok::<_, String>([1u8][std::hint::black_box(4)]));
        assert!(failed.unwrap_err().contains("index out of bounds"));
        assert!(!GUARDED.get());
    }
}
