//! The file system that a kernel boots with: the test binaries, and all that they need.

use std::{
    collections::BTreeSet,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use super::MARK;
use crate::command::{find, output, run as run_command};

/// Kernel modules that tests need, in load order: each comes after its dependencies. Built-in ones are skipped.
const MODULES: [&str; 10] = [
    "veth",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "netlink_diag",
    "sch_netem",
    "libcrc32c",
    "udp_tunnel",
    "ip6_udp_tunnel",
    "sctp",
];
/// Programs that tests run inside the VM.
const PROGRAMS: [&str; 2] = ["ip", "bpftool"];

/// Builds the initramfs, with the kernel modules below a folder if there are any, and returns the path of the image.
pub(super) fn build(
    modules_in: Option<&Path>,
    binaries: &[(String, PathBuf)],
    filter: Option<&str>,
    folder: &Path,
) -> Result<PathBuf> {
    let tree = folder.join("root");
    for place in ["bin", "proc", "sys", "dev", "run/netns", "tmp", "etc", "tests/deps", "modules"] {
        fs::create_dir_all(tree.join(place))?;
    }
    let busybox = find("busybox").context("busybox is not installed")?;
    fs::copy(&busybox, tree.join("bin/busybox"))?;
    let mut libraries = BTreeSet::new();
    for program in PROGRAMS {
        let path = fs::canonicalize(find(program).with_context(|| format!("{program} is not installed"))?)?;
        fs::copy(&path, tree.join("bin").join(program))?;
        libraries.extend(libraries_of(&path)?);
    }
    let built = binaries[0].1.ancestors().nth(2).context("a test binary has no grandparent directory")?;
    for name in ["portolan", "portolan-next", "dial", "storm"] {
        libraries.extend(install(&built.join(name), &tree.join("tests").join(name))?);
    }
    for (name, binary) in binaries {
        libraries.extend(install(binary, &tree.join("tests/deps").join(name))?);
    }
    for library in libraries {
        let place = tree.join(library.strip_prefix("/").unwrap_or(&library));
        fs::create_dir_all(place.parent().unwrap_or(&tree))?;
        fs::copy(&library, &place).with_context(|| format!("cannot copy {}", library.display()))?;
    }
    let mut modules = Vec::new();
    for (i, name) in MODULES.iter().enumerate() {
        // A built-in module has no file.
        if let Some(file) = modules_in.and_then(|folder| module(folder, name)) {
            unpack(&file, &tree.join(format!("modules/{i}-{name}.ko")))?;
            modules.push(format!("/modules/{i}-{name}.ko"));
        }
    }
    fs::write(tree.join("etc/passwd"), "root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")?;
    fs::write(tree.join("init"), script(&modules, binaries, filter))?;
    run_command(Command::new("chmod").arg("755").arg(tree.join("init")))?;
    let image = folder.join("image");
    pack(&tree, &image)?;
    Ok(image)
}

/// Returns the init script of the VM.
fn script(modules: &[String], binaries: &[(String, PathBuf)], filter: Option<&str>) -> String {
    let mut lines: Vec<String> = [
        "#!/bin/busybox sh",
        "/bin/busybox --install -s /bin",
        "export PATH=/bin HOME=/ RUST_BACKTRACE=0 PORTOLAN_PATIENCE=8 PORTOLAN_STORM_CONNECTIONS=4000 \
         PORTOLAN_ATTACK_ATTEMPTS=2000",
        "mount -t proc proc /proc",
        "mount -t sysfs sys /sys",
        "mount -t devtmpfs dev /dev",
        "mount -t tmpfs tmp /tmp",
        "mount -t tmpfs run /run && mkdir -p /run/netns",
        "mount -t cgroup2 cgroup /sys/fs/cgroup",
        "mount -t bpf bpf /sys/fs/bpf",
        "chmod 1777 /tmp",
        "ip link set lo up",
        // Servers of some tests hold more connections than the default allows.
        "ulimit -n 65536",
    ]
    .map(str::to_owned)
    .into();
    lines.extend(modules.iter().map(|module| format!("insmod {module}")));
    for (name, _) in binaries {
        let filter = filter.unwrap_or_default();
        lines.push(format!("/tests/deps/{name} --nocapture --test-threads=2 {filter} 2>&1; code=$?"));
        lines.push(format!("echo; echo \"{MARK}{name} $code\""));
    }
    lines.join("\n") + "\npoweroff -f\n"
}

/// Copies an executable without debug information, and returns its shared libraries.
fn install(from: &Path, to: &Path) -> Result<Vec<PathBuf>> {
    run_command(Command::new("strip").arg("--strip-debug").arg("-o").arg(to).arg(from))?;
    libraries_of(from)
}

fn libraries_of(program: &Path) -> Result<Vec<PathBuf>> {
    let listed = output(Command::new("ldd").arg(program))?;
    let paths = listed.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    Ok(paths.map(PathBuf::from).collect())
}

/// Returns the file of a kernel module, or `None` if there is none.
fn module(folder: &Path, name: &str) -> Option<PathBuf> {
    let mut folders = vec![folder.join("kernel")];
    while let Some(folder) = folders.pop() {
        for entry in entries(&folder).unwrap_or_default() {
            let file = named(&entry);
            if entry.is_dir() {
                folders.push(entry);
            } else if file.split(".ko").next().is_some_and(|own| own.replace('-', "_") == name) {
                return Some(entry);
            }
        }
    }
    None
}

fn unpack(module: &Path, to: &Path) -> Result<()> {
    let file = named(module);
    let program = match file.rsplit('.').next() {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => {
            fs::copy(module, to)?;
            return Ok(());
        }
    };
    run_command(Command::new(program).args(["-q", "-d", "-c"]).arg(module).stdout(fs::File::create(to)?))
}

fn pack(tree: &Path, image: &Path) -> Result<()> {
    let names = output(Command::new("find").arg(".").current_dir(tree))?;
    let mut cpio = Command::new("cpio");
    cpio.args(["--quiet", "-o", "-H", "newc"]).current_dir(tree).stdin(Stdio::piped()).stdout(fs::File::create(image)?);
    let mut cpio = cpio.spawn().context("cannot start cpio")?;
    cpio.stdin.take().context("cpio has no stdin pipe")?.write_all(names.as_bytes())?;
    ensure!(cpio.wait()?.success(), "cpio failed to pack the initramfs");
    Ok(())
}

pub(super) fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    entries.map(|entry| Ok(entry?.path())).collect()
}

pub(super) fn named(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
