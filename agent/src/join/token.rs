//! The join section, parsed: server, token, pins. Pure.

use super::{JoinError, Result};
use atoll_spec::node::JoinConfig;
use std::fmt;

/// `https://host:port` of an API server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// Name or address, without the brackets of IPv6.
    pub host: String,
    /// Port.
    pub port: u16,
}

impl Server {
    /// Parses a URL.
    ///
    /// # Errors
    /// When it is not an `https` URL of a host and nothing more.
    pub fn parse(url: &str) -> Result<Self> {
        let bad = || JoinError::Server { url: url.to_owned() };
        let uri: http::Uri = url.parse().map_err(|_| bad())?;
        let plain_path = matches!(uri.path(), "" | "/") && uri.query().is_none();
        let authority = uri.authority().ok_or_else(bad)?;
        if uri.scheme_str() != Some("https") || !plain_path || authority.as_str().contains('@') {
            return Err(bad());
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        if host.is_empty() {
            return Err(bad());
        }
        Ok(Self { host, port: authority.port_u16().unwrap_or(443) })
    }

    /// `host:port`, with brackets where they belong.
    pub fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "https://{}", self.authority())
    }
}

/// A bootstrap token. Its `Debug` shows the id only.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    id: String,
    secret: String,
}

impl Token {
    /// Parses `[a-z0-9]{6}.[a-z0-9]{16}`.
    ///
    /// # Errors
    /// When it is anything else; the message does not show it.
    pub fn parse(text: &str) -> Result<Self> {
        let fits = |part: &str, length: usize| {
            part.len() == length && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
        };
        match text.split_once('.') {
            Some((id, secret)) if fits(id, 6) && fits(secret, 16) => {
                Ok(Self { id: id.to_owned(), secret: secret.to_owned() })
            }
            _ => Err(JoinError::TokenFormat),
        }
    }

    /// The public half.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The secret half: the key of signatures.
    pub(super) fn secret(&self) -> &[u8] {
        self.secret.as_bytes()
    }

    /// The header that proves it. Only ever given to [`super::https::Verified`].
    pub(super) fn authorization(&self) -> String {
        format!("Bearer {}.{}", self.id, self.secret)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({}.…)", self.id)
    }
}

/// SHA-256 of a certificate's public key (SPKI).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Pin(pub [u8; 32]);

impl Pin {
    /// Parses `sha256:` and 64 hexadecimal digits.
    ///
    /// # Errors
    /// When it is anything else.
    pub fn parse(text: &str) -> Result<Self> {
        let bad = || JoinError::PinFormat { pin: text.to_owned() };
        let hex = text.strip_prefix("sha256:").ok_or_else(bad)?.as_bytes();
        if hex.len() != 64 {
            return Err(bad());
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(hex.chunks_exact(2)) {
            let digit = |at: u8| char::from(at).to_digit(16).and_then(|d| u8::try_from(d).ok());
            let (high, low) = (digit(pair[0]).ok_or_else(bad)?, digit(pair[1]).ok_or_else(bad)?);
            *byte = high << 4 | low;
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// How to join, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Join {
    /// Where.
    pub server: Server,
    /// With what.
    pub token: Token,
    /// Who vouches for it; never empty.
    pub pins: Vec<Pin>,
}

impl TryFrom<&JoinConfig> for Join {
    type Error = JoinError;

    fn try_from(config: &JoinConfig) -> Result<Self> {
        let pins = config.ca_pins.iter().map(|pin| Pin::parse(pin)).collect::<Result<Vec<_>>>()?;
        if pins.is_empty() {
            return Err(JoinError::NoPin);
        }
        Ok(Self { server: Server::parse(&config.server)?, token: Token::parse(&config.token)?, pins })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers() {
        let ok = |url| Server::parse(url).unwrap().to_string();
        assert_eq!(ok("https://10.0.0.1:6443"), "https://10.0.0.1:6443");
        assert_eq!(ok("https://supervisor.lab/"), "https://supervisor.lab:443");
        assert_eq!(ok("https://[2001:db8::1]:6443"), "https://[2001:db8::1]:6443");
        for bad in ["http://a:1", "https://a/b", "https://u@a", "a:6443", "https://a?b", ""] {
            assert!(Server::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn tokens_show_no_secret() {
        let token = Token::parse("abcdef.0123456789abcdef").unwrap();
        assert_eq!(format!("{token:?}"), "Token(abcdef.…)");
        for bad in ["abcdef", "abcdef.0123456789abcde", "ABCDEF.0123456789abcdef", "abcdef.0123456789abcdef "]
        {
            assert!(!Token::parse(bad).unwrap_err().to_string().contains("0123"), "{bad}");
        }
    }

    #[test]
    fn pins_round_trip_and_are_required() {
        let text = format!("sha256:{}", "0fA9".repeat(16));
        assert_eq!(Pin::parse(&text).unwrap().to_string(), text.to_lowercase());
        for bad in ["", "sha256:00", "sha1:00", &format!("sha256:{}", "g0".repeat(32))] {
            assert!(Pin::parse(bad).is_err(), "{bad}");
        }
        let config = JoinConfig {
            server: "https://a:1".into(),
            token: "abcdef.0123456789abcdef".into(),
            ca_pins: vec![],
        };
        assert!(matches!(Join::try_from(&config), Err(JoinError::NoPin)));
    }
}
