//! The detached signature on `cluster-info` (JWS, HS256): proof that its writer knows the token. Pure.

use super::token::Token;
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;

#[derive(serde::Deserialize)]
struct Header {
    alg: String,
    kid: String,
}

/// Whether `jws` (`header..signature`) signs `payload` with the token.
pub fn verify(jws: &str, payload: &[u8], token: &Token) -> bool {
    let mut parts = jws.split('.');
    let (Some(header), Some(""), Some(signature), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return false;
    };
    let named = BASE64_URL_SAFE_NO_PAD
        .decode(header)
        .ok()
        .and_then(|json| serde_json::from_slice::<Header>(&json).ok())
        .is_some_and(|header| header.alg == "HS256" && header.kid == token.id());
    let Ok(signature) = BASE64_URL_SAFE_NO_PAD.decode(signature) else { return false };
    let signed = format!("{header}.{}", BASE64_URL_SAFE_NO_PAD.encode(payload));
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, token.secret());
    named && ring::hmac::verify(&key, signed.as_bytes(), &signature).is_ok()
}

/// Signs, as the control plane does; for tests.
#[cfg(test)]
pub fn sign(payload: &[u8], token: &Token) -> String {
    let header = BASE64_URL_SAFE_NO_PAD.encode(format!(r#"{{"alg":"HS256","kid":"{}"}}"#, token.id()));
    let signed = format!("{header}.{}", BASE64_URL_SAFE_NO_PAD.encode(payload));
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, token.secret());
    format!("{header}..{}", BASE64_URL_SAFE_NO_PAD.encode(ring::hmac::sign(&key, signed.as_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(text: &str) -> Token {
        Token::parse(text).unwrap()
    }

    #[test]
    fn only_the_token_signs_and_only_these_bytes() {
        let ours = token("abcdef.0123456789abcdef");
        let jws = sign(b"payload", &ours);
        assert!(verify(&jws, b"payload", &ours));
        assert!(!verify(&jws, b"payload ", &ours));
        assert!(!verify(&jws, b"payload", &token("abcdef.0123456789abcdeX".to_lowercase().as_str())));
        assert!(!verify(&jws, b"payload", &token("bbcdef.0123456789abcdef")));
    }

    #[test]
    fn a_signature_that_names_another_algorithm_is_none() {
        let ours = token("abcdef.0123456789abcdef");
        let header = BASE64_URL_SAFE_NO_PAD.encode(r#"{"alg":"none","kid":"abcdef"}"#);
        for forged in
            [format!("{header}.."), format!("{header}..AA"), "..".into(), "a.b.c".into(), String::new()]
        {
            assert!(!verify(&forged, b"payload", &ours), "{forged}");
        }
    }
}
