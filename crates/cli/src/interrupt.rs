//! Ctrl-C ends what is being generated, not the program; elsewhere it ends the program.

use std::sync::atomic::{AtomicBool, Ordering};

static WATCHED: AtomicBool = AtomicBool::new(false);
static HAPPENED: AtomicBool = AtomicBool::new(false);

/// Sets the handler up. Until [`watch`] is called, Ctrl-C ends the program as usual.
pub fn install() {
    // Where there is no handler, Ctrl-C simply ends the program.
    let _ = ctrlc::set_handler(|| {
        if !WATCHED.swap(false, Ordering::SeqCst) {
            std::process::exit(130);
        }
        HAPPENED.store(true, Ordering::SeqCst);
    });
}

/// From now on the next Ctrl-C is for [`happened`]; one after that ends the program.
pub fn watch() {
    HAPPENED.store(false, Ordering::SeqCst);
    WATCHED.store(true, Ordering::SeqCst);
}

/// Whether Ctrl-C was pressed since [`watch`].
pub fn happened() -> bool {
    HAPPENED.load(Ordering::SeqCst)
}

/// Ctrl-C ends the program again.
pub fn unwatch() {
    WATCHED.store(false, Ordering::SeqCst);
}
