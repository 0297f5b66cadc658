//! Any text as a file of the mesh and of a cluster: it is read, and the policy makes of it what it can.
//!
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run --sanitizer none readers` in `core/`.
#![no_main]

#[path = "../../tests/common/mod.rs"]
mod common;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data) {
        common::through(text);
    }
});
