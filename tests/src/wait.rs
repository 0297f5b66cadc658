//! Waiting for something to become true, with a bound.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// How many times as long as elsewhere a machine may take: `PORTOLAN_PATIENCE`, for one that is emulated.
pub fn patience() -> u32 {
    std::env::var("PORTOLAN_PATIENCE").ok().and_then(|times| times.parse().ok()).unwrap_or(1)
}

/// Asks again and again, for `bound` at the most; the error tells what was seen last.
///
/// # Errors
/// It did not become true in time.
pub fn wait_until<T>(what: &str, bound: Duration, mut check: impl FnMut() -> Result<T>) -> Result<T> {
    let bound = bound * patience();
    let end = Instant::now() + bound;
    loop {
        match check() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() >= end => bail!("waited {bound:?} in vain for {what}: {error:#}"),
            Err(_) => thread::park_timeout(Duration::from_millis(5)),
        }
    }
}
