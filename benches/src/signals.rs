//! Ctrl-C.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tokio::signal::unix::{SignalKind, signal};

/// Becomes true with SIGINT or SIGTERM. The program `name` then stops at its next step, so that
/// everything is cleaned up on the way out. Children get the signal from the terminal themselves.
pub fn watch(name: &'static str) -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let watch = move || -> std::io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            let mut terminate = signal(SignalKind::terminate())?;
            loop {
                tokio::select! {
                    result = tokio::signal::ctrl_c() => result?,
                    _ = terminate.recv() => {}
                }
                eprintln!("{name}: stopping and cleaning up");
                stop.store(true, Ordering::Relaxed);
            }
        })
    };
    let _ = std::thread::Builder::new()
        .name("signals".into())
        .spawn(watch);
    stopped
}
