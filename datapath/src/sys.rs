//! `bpf()` commands that aya lacks: updating the program in a cgroup link, querying where a link is attached, and
//! reading socket storage.
//!
//! aya does not expose the descriptor of a link, so pinned links are opened here too.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use crate::programs::AttachType;

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_PROG_QUERY: libc::c_long = 16;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_LINK_DETACH: libc::c_long = 34;

/// Pins a link at a path on a bpffs.
pub(crate) fn pin(link: impl AsFd, pin: &Path) -> io::Result<()> {
    object(BPF_OBJ_PIN, pin, link.as_fd().as_raw_fd() as u32).map(drop)
}

/// Opens a pinned link.
pub(crate) fn open(pin: &Path) -> io::Result<OwnedFd> {
    let fd = object(BPF_OBJ_GET, pin, 0)?;
    // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Runs a command on a BPF object and its path on a bpffs.
fn object(command: libc::c_long, path: &Path, fd: u32) -> io::Result<i32> {
    #[repr(C)]
    struct Attr {
        path: u64,
        fd: u32,
        flags: u32,
    }
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = Attr { path: path.as_ptr().addr() as u64, fd, flags: 0 };
    // SAFETY: `attr` has the layout that these commands expect, and the path outlives the call.
    unsafe { bpf(command, &mut attr) }
}

/// Attaches a program to a cgroup through a new link, in addition to programs already attached there.
pub(crate) fn attach(cgroup: impl AsFd, program: impl AsFd, attach_type: AttachType) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        prog_fd: u32,
        target_fd: u32,
        attach_type: u32,
        flags: u32,
    }
    let mut attr = Attr {
        prog_fd: program.as_fd().as_raw_fd() as u32,
        target_fd: cgroup.as_fd().as_raw_fd() as u32,
        attach_type: attach_type as u32,
        flags: 0,
    };
    // SAFETY: `attr` has the layout that this command expects, and outlives the call.
    let fd = unsafe { bpf(BPF_LINK_CREATE, &mut attr)? };
    // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Detaches a link from its cgroup at once. If only its pin is removed, the kernel detaches it some time later.
pub(crate) fn detach(link: impl AsFd) -> io::Result<()> {
    let mut fd = link.as_fd().as_raw_fd() as u32;
    // SAFETY: the descriptor is the only attribute of this command.
    unsafe { bpf(BPF_LINK_DETACH, &mut fd) }.map(drop)
}

/// Replaces the program in a live link atomically: every connection sees the old program or the new one.
pub(crate) fn update(link: impl AsFd, program: impl AsFd) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        link_fd: u32,
        new_prog_fd: u32,
        flags: u32,
        old_prog_fd: u32,
    }
    let mut attr = Attr {
        link_fd: link.as_fd().as_raw_fd() as u32,
        new_prog_fd: program.as_fd().as_raw_fd() as u32,
        flags: 0,
        old_prog_fd: 0,
    };
    // SAFETY: `attr` has the layout that this command expects, and outlives the call.
    unsafe { bpf(BPF_LINK_UPDATE, &mut attr) }.map(drop)
}

/// `struct bpf_link_info` of linux/bpf.h, for a cgroup link.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LinkInfo {
    kind: u32,
    id: u32,
    /// Id of the linked program.
    pub(crate) program: u32,
    pad: u32,
    /// Id of the cgroup that the link is attached to; 0 once it is detached.
    pub(crate) cgroup: u64,
    attach_type: u32,
    tail: u32,
}

/// Returns the id of the cgroup that a link is attached to, or 0 once it is detached.
pub(crate) fn cgroup_id(link: impl AsFd) -> io::Result<u64> {
    Ok(info(link)?.cgroup)
}

/// Queries the kernel for the state of a link.
pub(crate) fn info(link: impl AsFd) -> io::Result<LinkInfo> {
    #[repr(C)]
    struct Attr {
        fd: u32,
        info_len: u32,
        info: u64,
    }
    let mut info = LinkInfo::default();
    let mut attr = Attr {
        fd: link.as_fd().as_raw_fd() as u32,
        info_len: size_of::<LinkInfo>() as u32,
        info: (&raw mut info).addr() as u64,
    };
    // SAFETY: `attr` has the layout that this command expects; `info` has the stated length and outlives the call.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)? };
    Ok(info)
}

/// Returns the ids of the programs attached to a cgroup for a hook.
/// With `effective`, includes programs inherited from its ancestors.
pub(crate) fn programs_of(cgroup: impl AsFd, attach_type: AttachType, effective: bool) -> io::Result<Vec<u32>> {
    #[repr(C)]
    struct Attr {
        target_fd: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        ids: u64,
        count: u32,
        pad: u32,
    }
    // The kernel allows 64 programs per cgroup, and cgroups may be nested.
    let mut ids = vec![0u32; 1024];
    let mut attr = Attr {
        target_fd: cgroup.as_fd().as_raw_fd() as u32,
        attach_type: attach_type as u32,
        query_flags: u32::from(effective),
        attach_flags: 0,
        ids: ids.as_mut_ptr().addr() as u64,
        count: ids.len() as u32,
        pad: 0,
    };
    // SAFETY: `attr` has the layout that this command expects; `ids` has the stated capacity and outlives the call.
    unsafe { bpf(BPF_PROG_QUERY, &mut attr)? };
    ids.truncate(attr.count as usize);
    Ok(ids)
}

/// Looks up the value of a socket in a socket storage map. Fails with ENOENT if the socket has none.
pub(crate) fn lookup_socket<T: aya::Pod>(map: impl AsFd, socket: impl AsFd) -> io::Result<T> {
    let key = socket.as_fd().as_raw_fd();
    let mut value = std::mem::MaybeUninit::<T>::zeroed();
    let mut element = Element::new(map.as_fd(), &raw const key, value.as_mut_ptr());
    // SAFETY: key and value have the map's sizes and outlive the call.
    unsafe { bpf(BPF_MAP_LOOKUP_ELEM, &mut element)? };
    // SAFETY: the kernel has written the value, and any bytes are a valid `Pod`.
    Ok(unsafe { value.assume_init() })
}

/// What the commands for one element of a map expect.
#[repr(C)]
struct Element {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

impl Element {
    fn new<K, V>(map: BorrowedFd<'_>, key: *const K, value: *const V) -> Self {
        Self { map_fd: map.as_raw_fd() as u32, pad: 0, key: key.addr() as u64, value: value.addr() as u64, flags: 0 }
    }
}

/// Creates an array with one value of four bytes, or an array of one such map if `inner` is given.
pub(crate) fn create_array(inner: Option<&OwnedFd>) -> io::Result<OwnedFd> {
    const ARRAY: u32 = 2;
    const ARRAY_OF_MAPS: u32 = 12;
    #[repr(C)]
    struct Attr {
        map_type: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
        flags: u32,
        inner_map_fd: u32,
    }
    let mut attr = Attr {
        map_type: if inner.is_some() { ARRAY_OF_MAPS } else { ARRAY },
        key_size: 4,
        value_size: 4,
        max_entries: 1,
        flags: 0,
        inner_map_fd: inner.map_or(0, |inner| inner.as_raw_fd() as u32),
    };
    // SAFETY: `attr` has the layout that this command expects, and outlives the call.
    let fd = unsafe { bpf(BPF_MAP_CREATE, &mut attr)? };
    // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sets the only entry of an array of maps.
pub(crate) fn set_inner(outer: &OwnedFd, inner: &OwnedFd) -> io::Result<()> {
    let (key, value) = (0u32, inner.as_raw_fd());
    let mut element = Element::new(outer.as_fd(), &raw const key, &raw const value);
    // SAFETY: key and value have the map's sizes and outlive the call.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut element) }.map(drop)
}

/// Counts the entries of a hash map, up to `most`.
/// If a key is removed during the iteration, the kernel restarts from the first one; `most` bounds the loop.
pub(crate) fn count_entries(map: impl AsFd, most: u64) -> io::Result<u64> {
    #[repr(C)]
    struct Attr {
        map_fd: u32,
        pad: u32,
        key: u64,
        next_key: u64,
    }
    // Longer than any key of Portolan's maps.
    let (mut key, mut next) = ([0u8; 64], [0u8; 64]);
    let mut count = 0;
    while count < most {
        let mut attr = Attr {
            map_fd: map.as_fd().as_raw_fd() as u32,
            pad: 0,
            key: if count == 0 { 0 } else { key.as_mut_ptr().addr() as u64 },
            next_key: next.as_mut_ptr().addr() as u64,
        };
        // SAFETY: `attr` has the layout that this command expects; both keys are long enough and outlive the call.
        match unsafe { bpf(BPF_MAP_GET_NEXT_KEY, &mut attr) } {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(count),
            Err(error) => return Err(error),
            Ok(_) => {}
        }
        key = next;
        count += 1;
    }
    Ok(count)
}

/// # Safety
/// `attr` must have the layout that `command` expects, and every pointer in it must be valid for the call.
unsafe fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<i32> {
    // SAFETY: the caller upholds the contract above.
    match unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) } {
        result if result < 0 => Err(io::Error::last_os_error()),
        result => Ok(result as i32),
    }
}
