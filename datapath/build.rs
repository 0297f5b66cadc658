//! Builds the eBPF object that `programs` embeds.
//!
//! Without the eBPF toolchain the object is empty.
//! The workspace still compiles, lints and builds its docs; an agent built this way refuses to start, and its error
//! message names the command that installs the toolchain.

use std::{env, error::Error, path::PathBuf, process::Command};

/// The binaries of the eBPF crate.
const OBJECTS: [&str; 2] = ["portolan", "floor"];

fn main() -> Result<(), Box<dyn Error>> {
    // Read at run time: another checkout that shares the target directory may have compiled this script.
    let manifest_dir = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let root = manifest_dir.parent().ok_or("the package has no parent directory")?;
    println!("cargo:rerun-if-env-changed=PORTOLAN_TOOLCHAIN");
    for input in ["ebpf/src", "ebpf/Cargo.toml", "common/src", "Cargo.lock", "Cargo.toml"] {
        println!("cargo:rerun-if-changed={}", root.join(input).display());
    }

    let out = PathBuf::from(env::var("OUT_DIR")?);
    let toolchain = env::var_os("PORTOLAN_TOOLCHAIN").map_or_else(|| root.join(".toolchain"), PathBuf::from);
    let bin = toolchain.join("bin");
    // The directory changes when the toolchain is installed; a tool in it may be a link to a file that is older than
    // this build.
    println!("cargo:rerun-if-changed={}", bin.display());
    for tool in ["rustc", "bpf-linker"] {
        let path = bin.join(tool);
        if !path.exists() {
            println!(
                "cargo::warning=the eBPF toolchain is not set up, so this build embeds no programs; run: cargo xtask toolchain"
            );
            return OBJECTS.iter().try_for_each(|name| Ok(std::fs::write(out.join(format!("{name}.bpf.o")), [])?));
        }
    }

    // OUT_DIR is <target>/<profile>/build/<package>/out. All profiles share one eBPF target directory.
    let next_schema = env::var_os("CARGO_FEATURE_NEXT_SCHEMA").is_some();
    let folder = if next_schema { "ebpf-next" } else { "ebpf" };
    let target = out.ancestors().nth(4).ok_or("OUT_DIR is not inside a target directory")?.join(folder);
    let arch = env::var("CARGO_CFG_TARGET_ARCH")?;
    let triple = match env::var("CARGO_CFG_TARGET_ENDIAN")?.as_str() {
        "big" => "bpfeb-unknown-none",
        _ => "bpfel-unknown-none",
    };
    let rustflags = [
        &format!("--cfg=bpf_target_arch=\"{arch}\""),
        "-Cdebuginfo=2",
        "-Clink-arg=--btf",
        // v3 provides atomic operations that return the previous value.
        "-Ctarget-cpu=v3",
    ]
    .join("\x1f");
    let path =
        env::join_paths([bin.clone()].into_iter().chain(env::split_paths(&env::var_os("PATH").unwrap_or_default())))?;

    let mut cargo = Command::new(env::var_os("CARGO").ok_or("CARGO is not set")?);
    cargo
        .current_dir(root.join("ebpf"))
        .args(["build", "--release", "-Z", "build-std=core", "--target", triple, "--target-dir"])
        .arg(&target)
        .env("PATH", path)
        .env("RUSTC", bin.join("rustc"))
        // The programs need unstable features; this enables them on a stable (distribution) compiler.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags)
        // Settings of the outer build do not apply to the eBPF target.
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("RUSTUP_TOOLCHAIN")
        .env_remove("CARGO_MAKEFLAGS")
        .env_remove("MAKEFLAGS");
    if next_schema {
        cargo.args(["--features", "next-schema"]);
    }
    let output = cargo.output()?;
    if !output.status.success() {
        for line in String::from_utf8_lossy(&output.stderr).lines() {
            println!("cargo::warning={line}");
        }
        println!(
            "cargo::error=the eBPF programs failed to compile; if the toolchain is broken, run: cargo xtask toolchain --force"
        );
        return Ok(());
    }
    for name in OBJECTS {
        std::fs::copy(target.join(triple).join("release").join(name), out.join(format!("{name}.bpf.o")))?;
    }
    Ok(())
}
