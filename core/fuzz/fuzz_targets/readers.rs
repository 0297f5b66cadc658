//! Feeds arbitrary text to the readers, as a mesh file and as a cluster file, and runs the policy on the result.
//!
//! Run it in `core/`: `RUSTC_BOOTSTRAP=1 cargo fuzz run --sanitizer none readers`.
#![no_main]

#[path = "../../tests/common/mod.rs"]
mod common;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data) {
        common::through(text);
    }
});
