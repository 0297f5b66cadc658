//! Reads two field offsets from the kernel's BTF: `sk_err` in `struct sock`, and `write_seq` in `struct tcp_sock`.
//!
//! General BTF crates build all hundred thousand types, which takes 85 MB and a third of a second.
//! This parser walks the records and stops at the requested one.
//! Format: `Documentation/bpf/btf.rst` of the kernel.

use std::path::Path;

use crate::error::Unsupported;

const MAGIC: u16 = 0xeb9f;
const KIND_STRUCT: u32 = 4;

/// Byte offsets from the start of a socket; `struct sock` is the first member of `struct tcp_sock`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Offsets {
    /// `sk_err` in `struct sock`
    pub(crate) error: u32,
    /// `write_seq` in `struct tcp_sock`
    pub(crate) written: u32,
}

pub(crate) fn offsets(path: &Path) -> Result<Offsets, Unsupported> {
    let btf = std::fs::read(path).map_err(|error| {
        Unsupported(format!(
            "cannot read {} ({error}): the kernel has no BTF; use a kernel built with CONFIG_DEBUG_INFO_BTF",
            path.display()
        ))
    })?;
    let error = member_offset(&btf, "sock", "sk_err");
    let written = member_offset(&btf, "tcp_sock", "write_seq");
    let (Some(error), Some(written)) = (error, written) else {
        return Err(Unsupported(format!("{} does not describe struct sock and struct tcp_sock", path.display())));
    };
    Ok(Offsets { error, written })
}

/// Returns the byte offset of a struct member, or `None` if it is not found or the BTF is malformed.
fn member_offset(btf: &[u8], structure: &str, member: &str) -> Option<u32> {
    let word = |at: usize| Some(u32::from_ne_bytes(btf.get(at..at + 4)?.try_into().ok()?));
    if u16::from_ne_bytes(btf.get(..2)?.try_into().ok()?) != MAGIC {
        return None;
    }
    let header = word(4)? as usize;
    let (types, types_len) = (header + word(8)? as usize, word(12)? as usize);
    let strings = btf.get(header + word(16)? as usize..)?;
    let named = |offset: u32, name: &str| {
        strings
            .get(offset as usize..)
            .is_some_and(|rest| rest.starts_with(name.as_bytes()) && rest.get(name.len()) == Some(&0))
    };
    let mut at = types;
    while at < types + types_len {
        let (name, info) = (word(at)?, word(at + 4)?);
        let (kind, count) = ((info >> 24) & 0x1f, (info & 0xffff) as usize);
        if kind == KIND_STRUCT && named(name, structure) {
            // With the kind flag set, the upper byte of an offset is a bit-field size.
            let mask = if info >> 31 == 1 { 0x00ff_ffff } else { u32::MAX };
            for i in 0..count {
                let field = at + 12 + 12 * i;
                if named(word(field)?, member) {
                    return Some((word(field + 8)? & mask) / 8);
                }
            }
        }
        at += 12 + record_tail(kind, count);
    }
    None
}

/// Returns the number of bytes that follow the common 12-byte header of a record.
fn record_tail(kind: u32, count: usize) -> usize {
    match kind {
        // Integers, variables, declaration tags.
        1 | 14 | 17 => 4,
        // Arrays.
        3 => 12,
        // Structs, unions, data sections, 64-bit enumerations.
        4 | 5 | 15 | 19 => 12 * count,
        // Enumerations, function prototypes.
        6 | 13 => 8 * count,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_offsets_in_running_kernel_btf() {
        let btf = std::fs::read("/sys/kernel/btf/vmlinux").unwrap();
        // __sk_common is the first member of struct sock, and sk_err comes after it.
        assert_eq!(member_offset(&btf, "sock", "__sk_common"), Some(0));
        assert!(member_offset(&btf, "sock", "sk_err").is_some_and(|offset| (128..1024).contains(&offset)));
        assert!(member_offset(&btf, "tcp_sock", "write_seq").is_some_and(|offset| (512..4096).contains(&offset)));
        assert_eq!(member_offset(&btf, "sock", "no_such_member"), None);
    }

    #[test]
    fn malformed_btf_yields_none() {
        assert_eq!(member_offset(&[], "sock", "sk_err"), None);
        let btf = std::fs::read("/sys/kernel/btf/vmlinux").unwrap();
        assert_eq!(member_offset(&btf[..1000], "sock", "sk_err"), None);
    }
}
