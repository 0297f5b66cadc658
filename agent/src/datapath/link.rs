//! What aya does not do with links of cgroup programs: exchange the program of one, and ask where it is attached. aya keeps
//! the descriptor of a link to itself, so a pinned one is opened here as well.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_LINK_UPDATE: libc::c_long = 29;

/// Pins a link.
pub(super) fn pin(link: impl AsFd, pin: &Path) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        path: u64,
        fd: u32,
        flags: u32,
    }
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let mut attr = Attr { path: path.as_ptr().addr() as u64, fd: link.as_fd().as_raw_fd() as u32, flags: 0 };
    // SAFETY: the attributes are those of this command; the path outlives the call.
    unsafe { bpf(BPF_OBJ_PIN, &mut attr) }.map(drop)
}

/// Opens a pinned link.
pub(super) fn open(pin: &Path) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        path: u64,
        fd: u32,
        flags: u32,
    }
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let mut attr = Attr { path: path.as_ptr().addr() as u64, fd: 0, flags: 0 };
    // SAFETY: the attributes are those of this command; the path outlives the call.
    let fd = unsafe { bpf(BPF_OBJ_GET, &mut attr)? };
    // SAFETY: the kernel has just given this descriptor to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Puts another program into a live link, in one step: no connection sees neither of them.
pub(super) fn update(link: impl AsFd, program: impl AsFd) -> io::Result<()> {
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
    // SAFETY: the attributes are those of this command, and outlive the call.
    unsafe { bpf(BPF_LINK_UPDATE, &mut attr) }.map(drop)
}

/// The id of the cgroup that a link is attached to; 0 where it no longer is.
pub(super) fn cgroup_id(link: impl AsFd) -> io::Result<u64> {
    /// `struct bpf_link_info` for a cgroup.
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        kind: u32,
        id: u32,
        program: u32,
        pad: u32,
        cgroup: u64,
        attach_type: u32,
        tail: u32,
    }
    #[repr(C)]
    struct Attr {
        fd: u32,
        info_len: u32,
        info: u64,
    }
    let mut info = Info::default();
    let mut attr = Attr {
        fd: link.as_fd().as_raw_fd() as u32,
        info_len: size_of::<Info>() as u32,
        info: (&raw mut info).addr() as u64,
    };
    // SAFETY: the attributes are those of this command; `info` is as long as they say, and outlives the call.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)? };
    Ok(info.cgroup)
}

/// # Safety
/// `attr` must be what the kernel expects for the command, and whatever it points to must be valid.
unsafe fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<i32> {
    // SAFETY: as the caller promises.
    match unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) } {
        result if result < 0 => Err(io::Error::last_os_error()),
        result => Ok(result as i32),
    }
}
