//! Waiting for a condition, with a time limit.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// Returns the factor that multiplies time limits: `PORTOLAN_PATIENCE`, which emulated machines set; 1 by default.
pub fn patience() -> u32 {
    std::env::var("PORTOLAN_PATIENCE").ok().and_then(|times| times.parse().ok()).unwrap_or(1)
}

/// Polls `check` every 5 ms until it succeeds, for at most `bound` times [`patience`].
///
/// # Errors
/// Returns an error that quotes the last error of `check` if it does not succeed in time.
pub fn wait_until<T>(what: &str, bound: Duration, mut check: impl FnMut() -> Result<T>) -> Result<T> {
    let bound = bound * patience();
    let end = Instant::now() + bound;
    loop {
        match check() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() >= end => bail!("timed out after {bound:?} waiting for {what}: {error:#}"),
            Err(_) => thread::park_timeout(Duration::from_millis(5)),
        }
    }
}
