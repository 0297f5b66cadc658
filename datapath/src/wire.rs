//! The protocol between agent and helper: each frame is a length (four bytes, little-endian) and a postcard value.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::error::Result;

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum HelperRequest {
    /// Describe the owner of the network namespace with this cookie.
    Name(u64),
    /// Attach the [`HTTP_INGRESS`](crate::programs::HTTP_INGRESS) program and pin its link.
    Packets,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum HelperResponse {
    Named(Option<String>),
    Attached(Result<(), String>),
}

/// Encodes a value as a frame.
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

/// Reads one frame. Returns `None` if the peer has closed the stream.
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

/// Decodes the length of the value that follows, and rejects one above [`MAX_FRAME_LEN`].
pub(crate) fn frame_len(length: [u8; 4]) -> io::Result<usize> {
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_FRAME_LEN {
        Err(io::Error::other(format!("frame of {length} bytes exceeds the limit of {MAX_FRAME_LEN}")))
    } else {
        Ok(length)
    }
}

/// Enough for the endpoints of half a million services.
const MAX_FRAME_LEN: usize = 256 << 20;
