//! Processes in a namespace and a cgroup, which are killed when their values are dropped.

use std::{
    env,
    ffi::OsStr,
    fs::{File, OpenOptions},
    io,
    os::{fd::AsRawFd as _, unix::process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::{Cgroup, Namespace, wait_until};

/// Where a process runs. `Default` inherits everything from the test.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProcessContext<'a> {
    /// Network namespace; `None` inherits the test's.
    pub namespace: Option<&'a Namespace>,
    /// Cgroup; `None` inherits the test's.
    pub cgroup: Option<&'a Cgroup>,
}

/// A process that is killed when the value is dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
}

impl Process {
    /// Starts a program in `place`.
    ///
    /// # Errors
    /// Returns an error if the namespace or the cgroup cannot be entered, or if the program cannot be started.
    pub fn spawn(mut command: Command, place: ProcessContext<'_>) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let namespace = place.namespace.map(Namespace::open).transpose()?;
        let procs = place.cgroup.map(procs_of).transpose()?;
        // SAFETY: the closure only makes system calls with descriptors that were opened before the fork.
        unsafe {
            command.pre_exec(move || {
                // No process may outlive the test, even a test that is killed.
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                    return Err(io::Error::last_os_error());
                }
                if let Some(procs) = &procs
                    && libc::write(procs.as_raw_fd(), c"0".as_ptr().cast(), 1) != 1
                {
                    return Err(io::Error::last_os_error());
                }
                if let Some(namespace) = &namespace
                    && libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) != 0
                {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        Ok(Self { child, name })
    }

    /// Returns the underlying [`Child`], for its pipes and its status.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Returns the process ID.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal to the process.
    ///
    /// # Errors
    /// Returns an error if the process no longer exists.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(Pid::from_child(&self.child), signal).with_context(|| format!("cannot signal {}", self.name))
    }

    /// Waits until the process exits, for at most `bound` times [`patience`](crate::patience).
    ///
    /// # Errors
    /// Returns an error if the process is still running after that time.
    pub fn wait(&mut self, bound: Duration) -> Result<ExitStatus> {
        let name = self.name.clone();
        wait_until(&format!("{name} to exit"), bound, || match self.child.try_wait()? {
            Some(status) => Ok(status),
            None => bail!("still running"),
        })
    }

    /// Kills the process with SIGKILL and reaps it.
    pub fn kill(&mut self) {
        // An error means that it has exited already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn procs_of(cgroup: &Cgroup) -> Result<File> {
    let path = cgroup.path().join("cgroup.procs");
    OpenOptions::new().write(true).open(&path).with_context(|| format!("cannot open {}", path.display()))
}

/// Returns the path of a workspace binary, in the build directory of the running one.
///
/// # Errors
/// Returns an error if the binary was not built.
pub fn binary(name: impl AsRef<OsStr>) -> Result<PathBuf> {
    let own = env::current_exe()?;
    // Test executables are in `deps`, where one may have the same name as a program.
    let mut folders = own.ancestors().skip(1).filter(|folder| !folder.ends_with("deps"));
    let found = folders.next().map(|folder| folder.join(name.as_ref())).filter(|path| path.is_file());
    let missing = || format!("{} is not built; run: cargo xtask test", Path::new(name.as_ref()).display());
    found.with_context(missing)
}
