//! `cargo xtask vm`: runs the kernel tests on other kernels than this machine's.
//!
//! Each kernel boots in QEMU with an initramfs that contains the test binaries, the agent, the programs that they run,
//! and the shared libraries of all of these.
//! The VM has no disk and no network: tests create what they need, as they do on this machine.

mod initramfs;

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader},
    num::NonZeroUsize,
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use serde_json::Value;

use self::initramfs::{entries, named};
use crate::{
    command::{cargo, find, need_root, output, root, run as run_command},
    demo, packages,
};

/// Debian kernel series that are tested by default.
const SERIES: [&str; 2] = ["6.1", "6.12"];
/// Test binaries that exercise the kernel.
const TESTS: [&str; 9] =
    ["lessons", "datapath", "datagrams", "algorithms", "limits", "outcomes", "hostile", "restart", "storm"];
/// Time limit of one boot, generous enough for full emulation.
const LIMIT: Duration = Duration::from_secs(7_200);
/// Prefix of console lines that carry a test result.
const MARK: &str = "@vm ";

/// Options of `cargo xtask vm`.
#[derive(Debug, Args)]
pub(crate) struct VmArgs {
    /// Kernel image to boot instead of Debian's 6.1 and 6.12; repeatable
    #[arg(long, value_name = "PATH")]
    kernel: Vec<PathBuf>,
    /// Directory with that kernel's modules (`lib/modules/VERSION`), if it is modular
    #[arg(long, value_name = "PATH")]
    modules: Option<PathBuf>,
    /// Debian kernel series to test; repeatable
    #[arg(long, value_name = "SERIES", default_values_t = SERIES.map(str::to_owned))]
    series: Vec<String>,
    /// Run only this test binary; repeatable
    #[arg(long, value_name = "NAME")]
    test: Vec<String>,
    /// Run only tests whose name contains this
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// QEMU accelerator; "kvm" is faster where available
    // With a thread for each CPU (`thread=multi`), QEMU 7.2 may let one execute a breakpoint that the kernel has already
    // replaced on all of them: "Oops: int3" at a jump label, where the memory holds the jump.
    #[arg(long, value_name = "NAME", default_value = "tcg,thread=single")]
    accel: String,
    /// Number of VMs that run at the same time [default: one for each CPU]
    ///
    /// With the default accelerator, each uses one CPU.
    #[arg(long, value_name = "COUNT")]
    jobs: Option<NonZeroUsize>,
    /// Skip this machine's own kernel
    #[arg(long)]
    no_host: bool,
    /// Show the whole console output of the VMs
    #[arg(long)]
    verbose: bool,
}

/// A kernel to boot, with its image and, if it is modular, its module directory.
struct Kernel {
    name: String,
    image: PathBuf,
    modules: Option<PathBuf>,
}

/// The number of instructions that the verifier processed for a program, and the budget for it.
struct Counted {
    program: String,
    instructions: u32,
    budget: u32,
}

/// Test results on one kernel.
struct Outcome {
    kernel: String,
    /// Test binaries, and whether all tests of each passed.
    tests: Vec<(String, bool)>,
    /// Verifier statistics per program.
    programs: Vec<Counted>,
    /// Test binaries during which the VM died. Each was retried once in a fresh VM.
    ended_in: Vec<String>,
    took: Duration,
}

impl Outcome {
    fn passed(&self) -> bool {
        !self.tests.is_empty() && self.ended_in.is_empty() && self.tests.iter().all(|(_, passed)| *passed)
    }
}

pub(crate) fn run(args: &VmArgs) -> Result<ExitCode> {
    need_root("the test")?;
    ensure!(cfg!(target_arch = "x86_64"), "cargo xtask vm supports only x86-64");
    demo::prepare()?;
    demo::prepare_next()?;
    packages::ensure_programs(&packages::VM)?;
    let kernels = kernels(args)?;
    let tests: Vec<&str> = match args.test.as_slice() {
        [] => TESTS.to_vec(),
        some => some.iter().map(String::as_str).collect(),
    };
    let binaries = test_binaries(&tests)?;
    let mut outcomes = Vec::new();
    if !args.no_host {
        eprintln!("==> this machine");
        outcomes.push(host(&binaries, args.filter.as_deref())?);
    }
    let jobs = args.jobs.map_or_else(std::thread::available_parallelism, Ok)?;
    outcomes.extend(side_by_side(&kernels, jobs, |kernel| {
        eprintln!("==> {}", kernel.name);
        all_of(kernel, &binaries, args)
    })?);
    print(&outcomes);
    Ok(if outcomes.iter().all(Outcome::passed) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs a function for each item on this many threads, and returns its results in the order of the items.
/// If some fail, all run nevertheless, and the first error is returned.
fn side_by_side<T: Sync, R: Send>(
    items: &[T],
    jobs: NonZeroUsize,
    run: impl Fn(&T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let (next, results) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    std::thread::scope(|scope| {
        for _ in 0..jobs.get().min(items.len()) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, SeqCst);
                    let Some(item) = items.get(at) else { return };
                    let result = run(item);
                    results.lock().unwrap_or_else(PoisonError::into_inner).insert(at, result);
                }
            });
        }
    });
    results.into_inner().unwrap_or_else(PoisonError::into_inner).into_values().collect()
}

/// Returns the kernels given with `--kernel`, or else Debian's.
fn kernels(args: &VmArgs) -> Result<Vec<Kernel>> {
    if args.kernel.is_empty() {
        return args.series.iter().map(|series| debian(series)).collect();
    }
    let named = args.kernel.iter().map(|image| {
        ensure!(image.is_file(), "--kernel {}: no such file", image.display());
        let name = image.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Kernel { name, image: image.clone(), modules: args.modules.clone() })
    });
    named.collect()
}

/// Returns the latest Debian kernel of a series. It is downloaded once, and cached below `.toolchain`.
fn debian(series: &str) -> Result<Kernel> {
    let folder = root().join(".toolchain/kernels").join(series);
    if !folder.join("boot").exists() {
        ensure!(
            find("apt-cache").is_some(),
            "downloading a Debian kernel needs apt; pass an image with --kernel PATH instead"
        );
        let package = latest(series)?;
        eprintln!("downloading {package}");
        fs::create_dir_all(&folder)?;
        run_command(Command::new("apt-get").args(["-qq", "download", &package]).current_dir(&folder))?;
        let fetched = entries(&folder)?.into_iter().find(|path| path.extension().is_some_and(|it| it == "deb"));
        let fetched = fetched.with_context(|| format!("apt-get download {package} left no .deb file"))?;
        run_command(Command::new("dpkg").arg("-x").arg(&fetched).arg(&folder))?;
        fs::remove_file(fetched)?;
    }
    let image = entries(&folder.join("boot"))?.into_iter().find(|path| named(path).starts_with("vmlinuz"));
    let image =
        image.with_context(|| format!("{} contains no kernel image; remove it and try again", folder.display()))?;
    let name = named(&image).trim_start_matches("vmlinuz-").to_owned();
    let modules = ["lib/modules", "usr/lib/modules"].map(|place| folder.join(place).join(&name));
    Ok(Kernel { modules: modules.into_iter().find(|place| place.exists()), name, image })
}

/// Returns the name of the package with the latest kernel of a series.
fn latest(series: &str) -> Result<String> {
    let pattern = format!("^linux-image-{}\\..*-cloud-amd64$", series.replace('.', "\\."));
    let search = || output(Command::new("apt-cache").args(["search", "--names-only", &pattern]));
    let mut found = search()?;
    if found.trim().is_empty() {
        run_command(Command::new("apt-get").args(["-qq", "update"]))?;
        found = search()?;
    }
    let numbers = |name: &str| {
        let numbers = name.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse::<u32>().ok());
        numbers.collect::<Vec<_>>()
    };
    let names = found.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned);
    let latest = names.max_by_key(|name| numbers(name));
    latest.with_context(|| format!("apt offers no kernel {series}; pass an image with --kernel PATH"))
}

/// Builds these test binaries, and returns their names and paths in the given order.
fn test_binaries(tests: &[&str]) -> Result<Vec<(String, PathBuf)>> {
    let mut build = cargo(&["test", "--quiet", "--package", "portolan-tests", "--no-run", "--message-format=json"]);
    for test in tests {
        build.args(["--test", test]);
    }
    let built = output(&mut build)?;
    let messages = built.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut found: Vec<(String, PathBuf)> = messages
        .filter_map(|message| {
            // Other targets can have the same name as a test.
            let is_test = message["target"]["kind"].as_array()?.iter().any(|kind| kind == "test");
            let executable = message["executable"].as_str().filter(|_| is_test)?;
            Some((message["target"]["name"].as_str()?.to_owned(), PathBuf::from(executable)))
        })
        .collect();
    found.retain(|(name, _)| tests.contains(&name.as_str()));
    found.sort_by_key(|(name, _)| tests.iter().position(|test| test == name));
    ensure!(found.len() == tests.len(), "expected the test binaries {tests:?}, but cargo built only {found:?}");
    Ok(found)
}

/// Runs the tests on this machine's kernel.
fn host(binaries: &[(String, PathBuf)], filter: Option<&str>) -> Result<Outcome> {
    let began = Instant::now();
    let (mut tests, mut programs) = (Vec::new(), Vec::new());
    for (name, binary) in binaries {
        let mut command = Command::new(binary);
        command.arg("--nocapture").args(filter).stdout(Stdio::piped()).stderr(Stdio::null()).env("RUST_BACKTRACE", "0");
        let mut child = command.spawn()?;
        let mut log = Vec::new();
        for line in BufReader::new(child.stdout.take().context("the test has no stdout pipe")?).lines() {
            let line = line?;
            programs.extend(counted(&line));
            log.push(line);
        }
        let passed = child.wait()?.success();
        eprintln!("  {name}: {}", if passed { "passed" } else { "FAILED" });
        if !passed {
            log.iter().for_each(|line| eprintln!("  | {line}"));
        }
        tests.push((name.clone(), passed));
    }
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned();
    Ok(Outcome { kernel, tests, programs, ended_in: Vec::new(), took: began.elapsed() })
}

/// Runs all test binaries on a kernel.
///
/// If the VM dies during one, the run counts as failed.
/// That binary and the remaining ones continue in a fresh VM, to get more results, unless it dies there again.
fn all_of(kernel: &Kernel, binaries: &[(String, PathBuf)], args: &VmArgs) -> Result<Outcome> {
    let mut outcome = boot(kernel, binaries, args)?;
    while outcome.tests.len() < binaries.len() {
        let rest = &binaries[outcome.tests.len()..];
        let name = rest[0].0.clone();
        if outcome.ended_in.contains(&name) {
            eprintln!("  {}: the VM died in {name} again; see its console output above", kernel.name);
            break;
        }
        eprintln!("  {}: the VM died in {name}; see its console output above. Continuing in a fresh VM", kernel.name);
        outcome.ended_in.push(name);
        let more = boot(kernel, rest, args)?;
        outcome.tests.extend(more.tests);
        outcome.programs.extend(more.programs);
        outcome.took += more.took;
    }
    Ok(outcome)
}

/// Boots a kernel, and reads test results from its console until it powers off or dies.
fn boot(kernel: &Kernel, binaries: &[(String, PathBuf)], args: &VmArgs) -> Result<Outcome> {
    let began = Instant::now();
    let folder = tempfile::tempdir()?;
    let image = initramfs::build(kernel.modules.as_deref(), binaries, args.filter.as_deref(), folder.path())?;
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-accel", &args.accel, "-cpu", "max", "-smp", "2", "-m", "3072"]);
    qemu.args(["-display", "none", "-monitor", "none", "-serial", "stdio", "-no-reboot", "-nic", "none"]);
    qemu.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(&image);
    qemu.args(["-append", "console=ttyS0 loglevel=5 softlockup_panic=1 panic=-1 mitigations=off rdinit=/init"]);
    qemu.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut qemu = qemu.spawn().context("cannot start qemu-system-x86_64")?;
    let id = rustix::process::Pid::from_child(&qemu);
    // The watchdog kills a VM that hangs, which closes its console.
    let (done, watch) = std::sync::mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if watch.recv_timeout(LIMIT) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            let _ = rustix::process::kill_process(id, rustix::process::Signal::KILL);
        }
    });
    let (mut tests, mut programs, mut log) = (Vec::new(), Vec::new(), Vec::new());
    let mut console = BufReader::new(qemu.stdout.take().context("qemu has no stdout pipe")?);
    let mut line = Vec::new();
    while console.read_until(b'\n', &mut line)? > 0 {
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        line.clear();
        if args.verbose {
            eprintln!("  {} | {text}", kernel.name);
        }
        programs.extend(counted(&text));
        if let Some(result) = text.strip_prefix(MARK)
            && let Some((name, code)) = result.split_once(' ')
        {
            let passed = code == "0";
            eprintln!(
                "  {}: {name}: {} after {:.0} s",
                kernel.name,
                if passed { "passed" } else { "FAILED" },
                began.elapsed().as_secs_f64()
            );
            if !passed && !args.verbose {
                log.iter().for_each(|line| eprintln!("  {} | {line}", kernel.name));
            }
            tests.push((name.to_owned(), passed));
            log.clear();
        } else {
            log.push(text);
        }
    }
    drop(done);
    qemu.wait()?;
    let _ = watchdog.join();
    if tests.len() < binaries.len() {
        log.iter().rev().take(60).rev().for_each(|line| eprintln!("  {} | {line}", kernel.name));
    }
    Ok(Outcome { kernel: kernel.name.clone(), tests, programs, ended_in: Vec::new(), took: began.elapsed() })
}

/// Parses a line `verified program NAME COUNT of BUDGET` from the output of the tests.
fn counted(line: &str) -> Option<Counted> {
    let mut words = line.split("verified program ").nth(1)?.split_whitespace();
    let (program, instructions) = (words.next()?.to_owned(), words.next()?.parse().ok()?);
    let budget = words.nth(1)?.parse().ok()?;
    Some(Counted { program, instructions, budget })
}

fn print(outcomes: &[Outcome]) {
    println!();
    for outcome in outcomes {
        let failed: Vec<&str> =
            outcome.tests.iter().filter(|(_, passed)| !passed).map(|(name, _)| name.as_str()).collect();
        let verdict = match (outcome.passed(), failed.as_slice()) {
            (true, _) => "passed".to_owned(),
            (false, []) => "FAILED: a VM died".to_owned(),
            (false, failed) => format!("FAILED: {}", failed.join(", ")),
        };
        println!(
            "{:<28} {} test binaries, {:.0} s: {verdict}",
            outcome.kernel,
            outcome.tests.len(),
            outcome.took.as_secs_f64()
        );
        for name in &outcome.ended_in {
            println!("{:<28} its VM died once in {name}, which was retried in a fresh VM", "");
        }
    }
    let programs = outcomes.iter().flat_map(|outcome| &outcome.programs);
    let budgets: BTreeMap<&String, u32> = programs.map(|counted| (&counted.program, counted.budget)).collect();
    if budgets.is_empty() {
        return;
    }
    println!("\ninstructions processed by the verifier:");
    print!("{:<14}", "program");
    outcomes.iter().for_each(|outcome| print!("{:>28}", outcome.kernel));
    println!("{:>10}", "budget");
    for (name, budget) in budgets {
        print!("{name:<14}");
        for outcome in outcomes {
            let count = outcome.programs.iter().find(|counted| counted.program == *name);
            print!("{:>28}", count.map_or_else(|| "-".to_owned(), |counted| counted.instructions.to_string()));
        }
        println!("{budget:>10}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_in_order_and_an_error_stops_nothing_else() {
        let (two, ran) = (NonZeroUsize::new(2).unwrap(), AtomicUsize::new(0));
        let doubled = side_by_side(&[1, 2, 3], two, |item| Ok(item * 2)).unwrap();
        assert_eq!(doubled, [2, 4, 6]);
        let failed = side_by_side(&[1, 2, 3], two, |item| {
            ran.fetch_add(1, SeqCst);
            ensure!(*item != 1, "the first");
            Ok(())
        });
        assert_eq!(failed.unwrap_err().to_string(), "the first");
        assert_eq!(ran.into_inner(), 3);
    }
}
