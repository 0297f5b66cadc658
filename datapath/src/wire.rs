//! What the agent and its helper exchange: frames of a length (four bytes, little-endian) and a postcard value.

use std::io::{self, Read, Write};

use anyhow::Result;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum HelperRequest {
    /// Whose is the network namespace with this cookie?
    Name(u64),
    /// Attach the program that sees packets, and pin its link.
    Packets,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum HelperResponse {
    Named(Option<String>),
    Attached(Result<(), String>),
}

/// What is as long as said, and then that.
pub(crate) fn encode_frame(value: &impl Serialize) -> io::Result<Vec<u8>> {
    let bytes = postcard::to_extend(value, vec![0; 4]).map_err(io::Error::other)?;
    let mut bytes: Vec<u8> = bytes;
    let length = u32::try_from(bytes.len() - 4).map_err(io::Error::other)?.to_le_bytes();
    frame_len(length)?;
    bytes[..4].copy_from_slice(&length);
    Ok(bytes)
}

pub(crate) fn write(stream: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    stream.write_all(&encode_frame(value)?)
}

/// `None`: the other side has ended.
pub(crate) fn read<T: DeserializeOwned>(stream: &mut impl Read) -> Result<Option<T>> {
    let mut length = [0; 4];
    match stream.read_exact(&mut length) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let mut bytes = vec![0; frame_len(length)?];
    stream.read_exact(&mut bytes)?;
    Ok(Some(postcard::from_bytes(&bytes)?))
}

/// The length of what follows.
pub(crate) fn frame_len(length: [u8; 4]) -> io::Result<usize> {
    let length = u32::from_le_bytes(length) as usize;
    if length > LONGEST { Err(io::Error::other(format!("{length} bytes are too many"))) } else { Ok(length) }
}

/// Enough for the endpoints of half a million services.
const LONGEST: usize = 256 << 20;
