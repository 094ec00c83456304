//! SPDY/3.1 frames, header blocks compressed with the protocol's dictionary.
//!
//! Called by `connection`. Invariants: what the peer sends is bounded before it is allocated; header blocks share one
//! compression state per direction, so every one is decompressed, in order, even when nobody wants it.

use bytes::{BufMut, Bytes, BytesMut};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt};

/// The dictionary that SPDY/3 header blocks are compressed with, as the protocol defines it.
const DICTIONARY: &[u8] = include_bytes!("dictionary.bin");
/// Largest payload of a control frame.
const MAX_CONTROL: usize = 64 << 10;
/// Largest header block, decompressed.
const MAX_HEADERS: usize = 64 << 10;
/// Largest piece of a data frame that is read at once. A frame may be 16 MiB long, and clients do send such ones: they
/// are never held as a whole.
pub const PIECE: usize = 32 << 10;

const VERSION: u16 = 3;
const FIN: u8 = 1;

mod kind {
    pub const SYN_STREAM: u16 = 1;
    pub const SYN_REPLY: u16 = 2;
    pub const RST_STREAM: u16 = 3;
    pub const PING: u16 = 6;
    pub const GOAWAY: u16 = 7;
    pub const HEADERS: u16 = 8;
}

/// Headers of a stream: names in lower case.
pub type Headers = Vec<(String, String)>;

/// A frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// The peer opens a stream.
    SynStream {
        /// Its number.
        stream: u32,
        /// Its headers.
        headers: Headers,
        /// The sender sends no data.
        fin: bool,
    },
    /// The stream is accepted.
    SynReply {
        /// Its number.
        stream: u32,
        /// Headers.
        headers: Headers,
    },
    /// The stream is cut off.
    Reset {
        /// Its number.
        stream: u32,
        /// Why.
        status: u32,
    },
    /// Are you there? To be sent back.
    Ping(u32),
    /// No more streams.
    GoAway {
        /// The last one that was accepted.
        last: u32,
    },
    /// Data of a stream. A long frame is read as several.
    Data {
        /// Its number.
        stream: u32,
        /// The data.
        data: Bytes,
        /// The last of it.
        fin: bool,
    },
    /// Settings, window updates, late headers: of no meaning here.
    Other,
}

fn bad(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.into())
}

/// Reads frames.
pub struct Reader<R> {
    from: R,
    headers: Decompress,
    rest: Option<Rest>,
}

/// What is still to be read of a data frame.
struct Rest {
    stream: u32,
    length: usize,
    fin: bool,
}

impl<R: AsyncRead + Unpin> Reader<R> {
    /// Reads from `from`.
    pub fn new(from: R) -> Self {
        Self { from, headers: Decompress::new(true), rest: None }
    }

    /// The next frame; `None` at a clean end. Not cancel-safe.
    pub async fn next(&mut self) -> io::Result<Option<Frame>> {
        if let Some(rest) = self.rest.take() {
            return self.piece(rest).await.map(Some);
        }
        let mut head = [0u8; 8];
        if self.from.read(&mut head[..1]).await? == 0 {
            return Ok(None);
        }
        self.from.read_exact(&mut head[1..]).await?;
        let [a, b, c, d, flags, l1, l2, l3] = head;
        let length = u32::from_be_bytes([0, l1, l2, l3]) as usize;
        let control = a & 0x80 != 0;
        if !control {
            let stream = u32::from_be_bytes([a, b, c, d]);
            return self.piece(Rest { stream, length, fin: flags & FIN != 0 }).await.map(Some);
        }
        if length > MAX_CONTROL {
            return Err(bad(format!("SPDY frame of {length} bytes, at most {MAX_CONTROL} are allowed")));
        }
        let mut payload = BytesMut::zeroed(length);
        self.from.read_exact(&mut payload).await?;
        let version = u16::from_be_bytes([a & 0x7f, b]);
        if version != VERSION {
            return Err(bad(format!("SPDY version {version}, only {VERSION} is spoken here")));
        }
        self.control(u16::from_be_bytes([c, d]), flags, &payload).map(Some)
    }

    async fn piece(&mut self, rest: Rest) -> io::Result<Frame> {
        let Rest { stream, length, fin } = rest;
        let mut data = BytesMut::zeroed(length.min(PIECE));
        self.from.read_exact(&mut data).await?;
        let length = length - data.len();
        if length > 0 {
            self.rest = Some(Rest { stream, length, fin });
        }
        Ok(Frame::Data { stream, data: data.freeze(), fin: fin && length == 0 })
    }

    fn control(&mut self, kind: u16, flags: u8, payload: &[u8]) -> io::Result<Frame> {
        let word = |at: usize| -> io::Result<u32> {
            let bytes = payload.get(at..at + 4).and_then(|b| <[u8; 4]>::try_from(b).ok());
            bytes.map(u32::from_be_bytes).ok_or_else(|| bad("SPDY frame too short"))
        };
        let stream = |at: usize| word(at).map(|w| w & 0x7fff_ffff);
        Ok(match kind {
            kind::SYN_STREAM => {
                let stream = stream(0)?;
                let block = payload.get(10..).ok_or_else(|| bad("SPDY frame too short"))?;
                Frame::SynStream { stream, headers: self.headers(block)?, fin: flags & FIN != 0 }
            }
            kind::SYN_REPLY => {
                let stream = stream(0)?;
                Frame::SynReply { stream, headers: self.headers(&payload[4..])? }
            }
            kind::RST_STREAM => Frame::Reset { stream: stream(0)?, status: word(4)? },
            kind::PING => Frame::Ping(word(0)?),
            kind::GOAWAY => Frame::GoAway { last: stream(0)? },
            kind::HEADERS => {
                stream(0)?;
                self.headers(&payload[4..])?;
                Frame::Other
            }
            _ => Frame::Other,
        })
    }

    fn headers(&mut self, block: &[u8]) -> io::Result<Headers> {
        let plain = decompress(&mut self.headers, block)?;
        parse_headers(&plain)
    }
}

fn decompress(state: &mut Decompress, mut input: &[u8]) -> io::Result<Vec<u8>> {
    let mut output = Vec::with_capacity(1024);
    loop {
        let before = (state.total_in(), output.len());
        let result = state.decompress_vec(input, &mut output, FlushDecompress::Sync);
        let used = (state.total_in() - before.0) as usize;
        input = &input[used..];
        match result {
            Ok(Status::StreamEnd) => return Err(bad("SPDY header compression ended")),
            Ok(_) if input.is_empty() && output.len() < output.capacity() => return Ok(output),
            Ok(_) => {}
            Err(error) if error.needs_dictionary().is_some() => {
                state.set_dictionary(DICTIONARY).map_err(|e| bad(format!("SPDY header block: {e}")))?;
                continue;
            }
            Err(error) => return Err(bad(format!("SPDY header block: {error}"))),
        }
        if output.len() > MAX_HEADERS {
            return Err(bad(format!("SPDY header block of more than {MAX_HEADERS} bytes")));
        }
        if output.len() < output.capacity() && (used, output.len()) == (0, before.1) {
            return Err(bad("SPDY header block is cut off"));
        }
        output.reserve(4096);
    }
}

fn parse_headers(mut block: &[u8]) -> io::Result<Headers> {
    fn word(block: &mut &[u8]) -> io::Result<usize> {
        let (head, rest) =
            block.split_first_chunk::<4>().ok_or_else(|| bad("SPDY header block too short"))?;
        *block = rest;
        Ok(u32::from_be_bytes(*head) as usize)
    }
    fn text(block: &mut &[u8]) -> io::Result<String> {
        let length = word(block)?;
        let (text, rest) =
            block.split_at_checked(length).ok_or_else(|| bad("SPDY header block too short"))?;
        *block = rest;
        Ok(String::from_utf8_lossy(text).into_owned())
    }
    let count = word(&mut block)?;
    let mut headers = Headers::new();
    for _ in 0..count {
        let name = text(&mut block)?.to_ascii_lowercase();
        headers.push((name, text(&mut block)?));
    }
    Ok(headers)
}

/// Writes frames.
pub struct Encoder {
    headers: Compress,
}

impl Default for Encoder {
    fn default() -> Self {
        Self { headers: Compress::new(Compression::fast(), true) }
    }
}

impl Encoder {
    /// A frame as bytes.
    pub fn encode(&mut self, frame: &Frame) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        match frame {
            Frame::Data { stream, data, fin } => {
                out.put_u32(stream & 0x7fff_ffff);
                out.put_u32((u32::from(*fin) << 24) | length(data.len())?);
                out.extend_from_slice(data);
            }
            Frame::SynStream { stream, headers, fin } => {
                let mut payload = Vec::new();
                payload.put_u32(*stream);
                payload.put_u32(0);
                payload.put_u16(0);
                self.compress(headers, &mut payload)?;
                control(&mut out, kind::SYN_STREAM, u8::from(*fin), &payload)?;
            }
            Frame::SynReply { stream, headers } => {
                let mut payload = Vec::new();
                payload.put_u32(*stream);
                self.compress(headers, &mut payload)?;
                control(&mut out, kind::SYN_REPLY, 0, &payload)?;
            }
            Frame::Reset { stream, status } => {
                control(
                    &mut out,
                    kind::RST_STREAM,
                    0,
                    &[stream.to_be_bytes(), status.to_be_bytes()].concat(),
                )?;
            }
            Frame::Ping(id) => control(&mut out, kind::PING, 0, &id.to_be_bytes())?,
            Frame::GoAway { last } => {
                control(&mut out, kind::GOAWAY, 0, &[last.to_be_bytes(), 0u32.to_be_bytes()].concat())?;
            }
            Frame::Other => {}
        }
        Ok(out)
    }

    fn compress(&mut self, headers: &Headers, out: &mut Vec<u8>) -> io::Result<()> {
        let failed = |e: flate2::CompressError| bad(format!("cannot compress SPDY headers: {e}"));
        if self.headers.total_in() == 0 {
            self.headers.set_dictionary(DICTIONARY).map_err(failed)?;
        }
        let mut plain = Vec::new();
        plain.put_u32(length(headers.len())?);
        for (name, value) in headers {
            for text in [name, value] {
                plain.put_u32(length(text.len())?);
                plain.extend_from_slice(text.as_bytes());
            }
        }
        let mut rest = &plain[..];
        loop {
            out.reserve(rest.len() + 256);
            let before = self.headers.total_in();
            self.headers.compress_vec(rest, out, FlushCompress::Sync).map_err(failed)?;
            rest = &rest[(self.headers.total_in() - before) as usize..];
            if rest.is_empty() && out.len() < out.capacity() {
                return Ok(());
            }
        }
    }
}

fn length(length: usize) -> io::Result<u32> {
    u32::try_from(length).ok().filter(|l| *l < 1 << 24).ok_or_else(|| bad("SPDY frame too long"))
}

fn control(out: &mut Vec<u8>, kind: u16, flags: u8, payload: &[u8]) -> io::Result<()> {
    out.put_u16(0x8000 | VERSION);
    out.put_u16(kind);
    out.put_u32((u32::from(flags) << 24) | length(payload.len())?);
    out.extend_from_slice(payload);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn block<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(work)
    }

    fn headers() -> impl Strategy<Value = Headers> {
        proptest::collection::vec(("[a-z-]{0,20}", "[ -~]{0,200}"), 0..8)
    }

    fn frames() -> impl Strategy<Value = Frame> {
        let stream = 1u32..0x7fff_ffff;
        prop_oneof![
            (stream.clone(), headers(), any::<bool>()).prop_map(|(stream, headers, fin)| Frame::SynStream {
                stream,
                headers,
                fin
            }),
            (stream.clone(), headers()).prop_map(|(stream, headers)| Frame::SynReply { stream, headers }),
            (stream.clone(), any::<u32>()).prop_map(|(stream, status)| Frame::Reset { stream, status }),
            any::<u32>().prop_map(Frame::Ping),
            stream.clone().prop_map(|last| Frame::GoAway { last }),
            (stream, proptest::collection::vec(any::<u8>(), 0..5000), any::<bool>())
                .prop_map(|(stream, data, fin)| Frame::Data { stream, data: data.into(), fin }),
        ]
    }

    proptest! {
        #[test]
        fn frames_survive_the_wire(sent in proptest::collection::vec(frames(), 0..20)) {
            let mut encoder = Encoder::default();
            let mut wire = Vec::new();
            for frame in &sent {
                wire.extend(encoder.encode(frame).unwrap());
            }
            let mut reader = Reader::new(&wire[..]);
            let mut received = Vec::new();
            while let Some(frame) = block(reader.next()).unwrap() {
                received.push(frame);
            }
            prop_assert_eq!(received, sent);
        }

        #[test]
        fn anything_read_is_a_frame_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut reader = Reader::new(&bytes[..]);
            while let Ok(Some(_)) = block(reader.next()) {}
            // The same behind the head of a control frame with headers.
            for kind in [kind::SYN_STREAM, kind::SYN_REPLY, kind::HEADERS] {
                let mut wire = Vec::new();
                control(&mut wire, kind, 0, &bytes).unwrap();
                let mut reader = Reader::new(&wire[..]);
                while let Ok(Some(_)) = block(reader.next()) {}
            }
        }
    }

    #[test]
    fn a_long_data_frame_is_read_in_pieces() {
        let sent: Vec<u8> = (0..3 * PIECE + 5).map(|n| (n % 251) as u8).collect();
        let frame = Frame::Data { stream: 7, data: sent.clone().into(), fin: true };
        let mut wire = Encoder::default().encode(&frame).unwrap();
        wire.extend(Encoder::default().encode(&Frame::Ping(1)).unwrap());
        let mut reader = Reader::new(&wire[..]);
        let (mut received, mut pieces) = (Vec::new(), Vec::new());
        while let Some(Frame::Data { stream: 7, data, fin }) = block(reader.next()).unwrap() {
            received.extend_from_slice(&data);
            pieces.push((data.len(), fin));
        }
        assert_eq!(pieces, [(PIECE, false), (PIECE, false), (PIECE, false), (5, true)]);
        assert_eq!(received, sent);
    }

    #[test]
    fn the_dictionary_is_the_one_of_the_protocol() {
        assert_eq!(DICTIONARY.len(), 1423);
        // RFC 1950's Adler-32 of it, which zlib streams name.
        let (mut a, mut b) = (1u32, 0u32);
        for byte in DICTIONARY {
            a = (a + u32::from(*byte)) % 65521;
            b = (b + a) % 65521;
        }
        assert_eq!((b << 16) | a, 0xe3c6_a7c2);
    }

    #[test]
    fn a_compression_bomb_is_refused() {
        let mut state = Compress::new(Compression::best(), true);
        state.set_dictionary(DICTIONARY).unwrap();
        let mut bomb = Vec::with_capacity(1 << 20);
        state.compress_vec(&vec![0u8; 10 << 20], &mut bomb, FlushCompress::Sync).unwrap();
        assert!(bomb.len() < MAX_CONTROL);
        assert!(decompress(&mut Decompress::new(true), &bomb).is_err());
    }
}
