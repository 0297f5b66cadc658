//! The commands that README shows for a laptop work as shown.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::{fs, path::Path, process::Command};

#[test]
fn commands_for_a_laptop_succeed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    let commands: Vec<&str> =
        readme.lines().filter_map(|line| line.strip_prefix("cargo run -p portolan -- ")).collect();
    assert!(commands.len() >= 3, "{commands:?}");
    for command in commands {
        let output = Command::new(env!("CARGO_BIN_EXE_portolan"))
            .current_dir(root)
            .args(command.split_whitespace())
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "portolan {command}: {}\n{error}", output.status);
        assert!(!output.stdout.is_empty(), "portolan {command} prints nothing");
    }
}
