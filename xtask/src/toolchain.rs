//! Sets up the toolchain for the eBPF programs.
//!
//! It consists of a rustc whose `core` can be compiled for the BPF target, and a bpf-linker built with the same LLVM.
//! Both are linked as `.toolchain/bin/{rustc,bpf-linker}`, where the build script of `datapath` looks for them.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    command::{cargo, find, output, root, run},
    packages,
};

const LINKER_VERSION: &str = "0.13.0";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

/// Sets up the toolchain if needed, and prints its versions. `force` removes an existing one first.
pub(crate) fn ensure(force: bool) -> Result<()> {
    let folder = root().join(".toolchain");
    let bin = folder.join("bin");
    if force && folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    fs::create_dir_all(&bin).with_context(|| format!("cannot create {}", bin.display()))?;
    let (rustc, linker) = (bin.join("rustc"), bin.join("bpf-linker"));
    if !(works(&rustc) && has_core_source(&rustc)) {
        let found = find_rustc()?;
        replace_link(&found, &rustc)?;
        eprintln!("toolchain: rustc is {}", found.display());
    }
    let llvm = llvm_major(&rustc)?;
    if !works(&linker) {
        provide_linker(&folder, &linker, llvm)?;
    }
    eprintln!("toolchain: ready ({}, LLVM {llvm}, {})", version(&rustc)?, version(&linker)?);
    Ok(())
}

/// Finds a rustc with the source of `core`: a rustup nightly with rust-src, or else Debian's, installed if needed.
fn find_rustc() -> Result<PathBuf> {
    let mut nightly = Command::new("rustup");
    nightly.args(["run", "nightly", "rustc", "--print", "sysroot"]);
    if let Ok(sysroot) = output(&mut nightly) {
        let rustc = Path::new(sysroot.trim()).join("bin/rustc");
        if has_core_source(&rustc) {
            return Ok(rustc);
        }
        eprintln!(
            "toolchain: rustup's nightly lacks rust-src (rustup component add rust-src --toolchain nightly); \
             using Debian's rustc"
        );
    }
    let debian = PathBuf::from(DEBIAN_RUSTC);
    if !has_core_source(&debian) {
        packages::install(&["rustc-web", "rust-web-src"]).context(
            "the eBPF programs need a rustc with the source of core: a rustup nightly with rust-src, or these packages",
        )?;
    }
    ensure!(
        has_core_source(&debian),
        "{DEBIAN_RUSTC} lacks the source of core; install a rustup nightly with rust-src"
    );
    Ok(debian)
}

fn has_core_source(rustc: &Path) -> bool {
    let sysroot = output(Command::new(rustc).args(["--print", "sysroot"])).unwrap_or_default();
    !sysroot.is_empty() && Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs").exists()
}

/// Links the bpf-linker on PATH if it uses the same LLVM as rustc; otherwise builds one.
fn provide_linker(folder: &Path, linker: &Path, llvm: u32) -> Result<()> {
    if let Some(found) = find("bpf-linker") {
        let about = output(Command::new(&found).arg("--version")).unwrap_or_default();
        if about.contains(&format!("LLVM {llvm}.")) {
            eprintln!("toolchain: bpf-linker is {}", found.display());
            return replace_link(&found, linker);
        }
        eprintln!("toolchain: {} does not report LLVM {llvm}, which rustc uses; building another", found.display());
    }
    let prefix = format!("/usr/lib/llvm-{llvm}");
    if !Path::new(&prefix).join("bin/llvm-config").exists() {
        packages::install(&[&format!("llvm-{llvm}-dev"), &format!("libpolly-{llvm}-dev")])?;
    }
    eprintln!("toolchain: building bpf-linker {LINKER_VERSION} (a minute or two)");
    let path = std::env::var("PATH").unwrap_or_default();
    let mut install =
        cargo(&["install", "bpf-linker", "--quiet", "--locked", "--no-default-features", "--version", LINKER_VERSION]);
    install
        .args(["--features", &format!("llvm-{llvm}"), "--root"])
        .arg(folder)
        .env(format!("LLVM_SYS_{llvm}1_PREFIX"), &prefix)
        .env("PATH", format!("{prefix}/bin:{path}"));
    run(&mut install)
        .context("cannot build bpf-linker; build it manually (cargo install bpf-linker) and put it on PATH")
}

/// Returns the major version of the LLVM that a rustc was built with.
fn llvm_major(rustc: &Path) -> Result<u32> {
    let about = output(Command::new(rustc).arg("-vV"))?;
    let line = about.lines().find_map(|line| line.strip_prefix("LLVM version: ")).unwrap_or_default();
    match line.split('.').next().and_then(|major| major.parse().ok()) {
        Some(major) => Ok(major),
        None => bail!("{} -vV reports no LLVM version", rustc.display()),
    }
}

fn works(program: &Path) -> bool {
    version(program).is_ok()
}

fn version(program: &Path) -> Result<String> {
    let about = output(Command::new(program).arg("--version"))?;
    Ok(about.lines().next().unwrap_or_default().to_owned())
}

fn replace_link(to: &Path, at: &Path) -> Result<()> {
    if at.is_symlink() || at.exists() {
        fs::remove_file(at)?;
    }
    symlink(to, at).with_context(|| format!("cannot link {} to {}", at.display(), to.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A `portolan` that works needs the toolchain, so xtask, which sets the toolchain up, must not depend on it.
    #[test]
    fn xtask_does_not_depend_on_agent() {
        let needs =
            ["tree", "--quiet", "--offline", "--package", "xtask", "--edges", "normal,build", "--prefix", "none"];
        let tree = output(&mut cargo(&needs)).unwrap();
        assert!(tree.contains("portolan-tests v"), "{tree}");
        assert!(!tree.contains("portolan v"), "{tree}");
    }
}
