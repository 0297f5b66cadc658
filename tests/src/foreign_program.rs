//! Third-party programs on a cgroup.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    path::Path,
};

use anyhow::{Context as _, Result};

use crate::Cgroup;

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_DETACH: libc::c_long = 9;
const BPF_LINK_UPDATE: libc::c_long = 29;
const PROG_TYPE_SOCK_OPS: u32 = 13;
const PROG_TYPE_CGROUP_SOCK_ADDR: u32 = 18;
const SOCK_OPS: u32 = 3;
const CONNECT4: u32 = 10;
const CONNECT6: u32 = 11;
const ALLOW_MULTI: u32 = 2;

/// What a third-party program does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Foreign {
    /// On the connect4 hook, it allows every connection.
    Allow,
    /// On the connect4 hook, it denies every connection, with EPERM.
    Deny,
    /// On the connect6 hook, it denies every connection but those to IPv4-mapped addresses, with EPERM.
    DenyV6,
    /// On the sock_ops hook, it disables all callbacks of each new connection, so that no program sees its end.
    HideEnds,
}

impl Foreign {
    /// Returns the program's type, its hook, and its instructions.
    fn program(self) -> (u32, u32, &'static [u64]) {
        /// `exit`
        const EXIT: u64 = 0x95;
        /// `r0 = 0`, `r0 = 1`
        const R0: [u64; 2] = [0xb7, 0x0000_0001_0000_00b7];
        match self {
            Self::Allow => (PROG_TYPE_CGROUP_SOCK_ADDR, CONNECT4, &[R0[1], EXIT]),
            Self::Deny => (PROG_TYPE_CGROUP_SOCK_ADDR, CONNECT4, &[R0[0], EXIT]),
            Self::DenyV6 => {
                let code = &[
                    // r2 = *(u32 *)(r1 + 16): the third word of the address
                    0x0000_0000_0010_1261,
                    R0[1],
                    // if (u32) r2 == 0xffff0000 (in network order, as it is in memory): skip one instruction
                    0xffff_0000_0001_0216,
                    R0[0],
                    EXIT,
                ];
                (PROG_TYPE_CGROUP_SOCK_ADDR, CONNECT6, code)
            }
            Self::HideEnds => {
                let code = &[
                    // r2 = *(u32 *)(r1 + 0): the event
                    0x0000_0000_0000_1261,
                    // if r2 != 4 (a connection is established): skip two instructions
                    0x0000_0004_0002_0255,
                    // r2 = 0
                    0x0000_0000_0000_02b7,
                    // call bpf_sock_ops_cb_flags_set
                    0x0000_003b_0000_0085,
                    R0[1],
                    EXIT,
                ];
                (PROG_TYPE_SOCK_OPS, SOCK_OPS, code)
            }
        }
    }
}

/// A third-party program on a hook, attached with `BPF_PROG_ATTACH` instead of a link.
/// It is detached when the value is dropped.
#[derive(Debug)]
pub struct ForeignProgram {
    program: OwnedFd,
    cgroup: File,
    hook: u32,
}

impl ForeignProgram {
    /// Attaches a program to a cgroup.
    ///
    /// # Errors
    /// Returns an error if the kernel rejects the program or its attachment.
    pub fn attach(cgroup: &Cgroup, what: Foreign) -> Result<Self> {
        let (_, hook, _) = what.program();
        let foreign = Self { program: Self::load(what)?, cgroup: File::open(cgroup.path())?, hook };
        foreign.change(BPF_PROG_ATTACH).context("cannot attach a program")?;
        Ok(foreign)
    }

    /// Puts a program in the place of the one in a pinned link, which stays attached.
    ///
    /// # Errors
    /// Returns an error if there is no such link, or if the kernel rejects the program.
    pub fn replace_in_link(pin: &Path, what: Foreign) -> Result<()> {
        let program = Self::load(what)?;
        let path = std::ffi::CString::new(pin.as_os_str().as_encoded_bytes())?;
        let mut attr = [0u32; 32];
        set_pointer(&mut attr, 0, path.as_ptr().addr());
        let link = bpf(BPF_OBJ_GET, &mut attr).with_context(|| format!("cannot open {}", pin.display()))?;
        // SAFETY: the kernel just returned this descriptor, so nothing else owns it.
        let link = unsafe { OwnedFd::from_raw_fd(link) };
        let mut attr = [0u32; 32];
        (attr[0], attr[1]) = (link.as_raw_fd() as u32, program.as_raw_fd() as u32);
        bpf(BPF_LINK_UPDATE, &mut attr).context("cannot replace the program")?;
        Ok(())
    }

    fn load(what: Foreign) -> Result<OwnedFd> {
        let (kind, hook, code) = what.program();
        let license = c"GPL";
        let mut attr = [0u32; 32];
        attr[0] = kind;
        attr[1] = code.len() as u32;
        set_pointer(&mut attr, 2, code.as_ptr().addr());
        set_pointer(&mut attr, 4, license.as_ptr().addr());
        let name = *b"foreign\0";
        attr[12] = u32::from_ne_bytes([name[0], name[1], name[2], name[3]]);
        attr[13] = u32::from_ne_bytes([name[4], name[5], name[6], name[7]]);
        attr[17] = hook;
        let program = bpf(BPF_PROG_LOAD, &mut attr).context("cannot load a program")?;
        // SAFETY: the kernel just returned this descriptor, so nothing else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(program) })
    }

    /// Returns whether the program is still attached, by detaching and reattaching it.
    pub fn is_attached(&self) -> bool {
        self.change(BPF_PROG_DETACH).and_then(|()| self.change(BPF_PROG_ATTACH)).is_ok()
    }

    /// Returns the program's run time in nanoseconds and its number of runs.
    /// The kernel counts both only while a [`CountingServer`](crate::CountingServer) exists.
    ///
    /// # Errors
    /// Returns an error if the kernel does not report them.
    pub fn counted(&self) -> Result<(u64, u64)> {
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", self.program.as_raw_fd()))?;
        let field = |name: &str| -> Result<u64> {
            let line = info.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name}"))?;
            Ok(line.trim().parse()?)
        };
        Ok((field("run_time_ns:")?, field("run_cnt:")?))
    }

    fn change(&self, command: libc::c_long) -> io::Result<()> {
        let mut attr = [0u32; 32];
        attr[0] = self.cgroup.as_raw_fd() as u32;
        attr[1] = self.program.as_raw_fd() as u32;
        attr[2] = self.hook;
        attr[3] = if command == BPF_PROG_ATTACH { ALLOW_MULTI } else { 0 };
        bpf(command, &mut attr).map(drop)
    }
}

impl Drop for ForeignProgram {
    fn drop(&mut self) {
        if let Err(error) = self.change(BPF_PROG_DETACH) {
            eprintln!("cannot detach the foreign program: {error}");
        }
    }
}

fn set_pointer(attr: &mut [u32; 32], at: usize, pointer: usize) {
    let words = (pointer as u64).to_ne_bytes();
    attr[at] = u32::from_ne_bytes([words[0], words[1], words[2], words[3]]);
    attr[at + 1] = u32::from_ne_bytes([words[4], words[5], words[6], words[7]]);
}

pub(crate) fn bpf(command: libc::c_long, attr: &mut [u32; 32]) -> io::Result<i32> {
    // SAFETY: the attributes match the command, and what they point to outlives the call.
    match unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_mut_ptr(), size_of_val(attr)) } {
        result if result < 0 => Err(io::Error::last_os_error()),
        result => Ok(result as i32),
    }
}
