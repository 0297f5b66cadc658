//! Finds network namespaces and their owners.

use std::{
    collections::{HashMap, hash_map::Entry},
    fs::{self, File},
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::fs::MetadataExt as _,
    },
    path::PathBuf,
    thread,
};

use rustix::{
    net::{AddressFamily, SocketType, socket},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use crate::error::Result;

/// Returns every network namespace that a thread is in or that is named in `/run/netns`, each with its path.
/// Appends errors to `errors`; the result is then incomplete.
pub(crate) fn namespaces(errors: &mut Vec<String>) -> Vec<(PathBuf, File)> {
    let mut found: HashMap<(u64, u64), (PathBuf, File)> = HashMap::new();
    let mut add = |path: PathBuf| {
        // Processes may exit during the scan; an open file keeps its namespace alive.
        let Ok(metadata) = fs::metadata(&path) else { return };
        if let Entry::Vacant(entry) = found.entry((metadata.dev(), metadata.ino()))
            && let Ok(file) = File::open(&path)
        {
            entry.insert((path, file));
        }
    };
    match fs::read_dir("/proc") {
        Ok(entries) => {
            let is_process = |name: &str| name.bytes().all(|byte| byte.is_ascii_digit());
            let entries = entries.flatten().filter(|entry| entry.file_name().to_str().is_some_and(is_process));
            // A namespace is named after the first process found in it: one that lives there, not one of whose threads
            // only visits it, as those of an agent do.
            let processes: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
            processes.iter().for_each(|process| add(process.join("ns/net")));
            // Other threads may be in other namespaces, and the main thread may have exited.
            for process in &processes {
                for thread in fs::read_dir(process.join("task")).into_iter().flatten().flatten() {
                    if Some(thread.file_name().as_os_str()) != process.file_name() {
                        add(thread.path().join("ns/net"));
                    }
                }
            }
        }
        Err(error) => errors.push(format!("cannot read /proc: {error}")),
    }
    for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        add(entry.path());
    }
    found.into_values().collect()
}

/// Describes the owner of the network namespace with this cookie, for display.
///
/// Returns its first process and the cgroup of that, or the path of a named namespace.
/// Returns `None` if the namespace no longer exists or is not visible.
/// Scans all namespaces, on a separate thread because that changes the thread's own namespace.
pub(crate) fn name_namespace(cookie: u64) -> Option<String> {
    let find = move || {
        let found = namespaces(&mut Vec::new());
        let own = |(_, namespace): &(PathBuf, File)| cookie_of(namespace).is_ok_and(|its| its == cookie);
        found.into_iter().find(own).map(|(path, _)| describe(&path))
    };
    thread::spawn(find).join().ok().flatten()
}

/// Returns the cookie of a network namespace. Moves the calling thread into it.
fn cookie_of(namespace: &File) -> Result<u64> {
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    let (mut cookie, mut len) = (0u64, size_of::<u64>() as libc::socklen_t);
    // SAFETY: the option's value is eight bytes long, and so is the buffer.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if result != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(cookie)
}

/// Describes a namespace by the path where it was found: `/proc/PID/...`, or a name in `/run/netns`.
fn describe(path: &std::path::Path) -> String {
    let process = path.parent().and_then(|folder| folder.parent()).filter(|folder| folder.starts_with("/proc"));
    let Some(process) = process else { return path.display().to_string() };
    let read = |name: &str| fs::read_to_string(process.join(name)).unwrap_or_default();
    let (name, cgroups) = (read("comm"), read("cgroup"));
    let cgroup = cgroups.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default();
    let id = process.file_name().unwrap_or_default().to_string_lossy();
    // A process chooses its own name, so replace control characters.
    let name: String = name.trim().chars().map(|letter| if letter.is_control() { '?' } else { letter }).collect();
    format!("process {id} ({name}) in cgroup {cgroup}")
}
