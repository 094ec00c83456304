//! Fetches a machine config over HTTP or HTTPS: bounded in time and size, certificates checked against the system's.

use crate::error::{Error, Result};
use http::Uri;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

/// For looking up, connecting, TLS and the whole transfer.
pub const DEADLINE: Duration = Duration::from_secs(15);
/// Redirects that are followed, never from https to http.
const REDIRECTS: usize = 3;

/// Gets `url`. `certificates` is a PEM bundle of the authorities to trust.
pub async fn get(url: &str, certificates: &Path, limit: usize) -> Result<Vec<u8>> {
    let failed = |reason: String| Error::Fetch { url: without_secrets(url), reason };
    let fetching = async {
        let mut uri: Uri = url.parse().map_err(|error| format!("it is not a URL: {error}"))?;
        for _ in 0..=REDIRECTS {
            match request(&uri, certificates, limit).await? {
                Reply::Content(bytes) => return Ok(bytes),
                Reply::Elsewhere(next) => uri = follow(&uri, &next)?,
            }
        }
        Err(format!("it redirects more than {REDIRECTS} times"))
    };
    match tokio::time::timeout(DEADLINE, fetching).await {
        Ok(result) => result.map_err(failed),
        Err(_) => Err(failed(format!("it took longer than {} s", DEADLINE.as_secs()))),
    }
}

/// For messages: without user, password and query.
fn without_secrets(url: &str) -> String {
    let plain = url.split(['?', '#']).next().unwrap_or_default();
    match plain.split_once("://") {
        Some((scheme, rest)) => {
            let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
            format!("{scheme}://{}/{path}", authority.rsplit('@').next().unwrap_or_default())
        }
        None => plain.to_owned(),
    }
}

enum Reply {
    Content(Vec<u8>),
    Elsewhere(String),
}

fn follow(from: &Uri, to: &str) -> Result<Uri, String> {
    let next: Uri = to.parse().map_err(|_| "it redirects to something that is not a URL".to_owned())?;
    if next.scheme().is_none() {
        return Err("it redirects to a relative address: give the final URL".into());
    }
    if from.scheme_str() == Some("https") && next.scheme_str() != Some("https") {
        return Err("it redirects from https to http".into());
    }
    Ok(next)
}

async fn request(uri: &Uri, certificates: &Path, limit: usize) -> Result<Reply, String> {
    let host = uri.host().ok_or("it names no host")?.to_owned();
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let tls = match uri.scheme_str() {
        Some("https") => true,
        Some("http") => false,
        _ => return Err("only http:// and https:// are understood".into()),
    };
    let port = uri.port_u16().unwrap_or(if tls { 443 } else { 80 });
    let trusted = if tls { Some(trust(certificates)?) } else { None };
    let connection = TcpStream::connect((bare, port)).await;
    let connection = connection.map_err(|error| format!("cannot connect to {host}:{port}: {error}"))?;
    let Some(trusted) = trusted else { return exchange(connection, uri, &host, limit).await };
    let name =
        ServerName::try_from(bare.to_owned()).map_err(|_| format!("{host} cannot be a server's name"))?;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(trusted));
    let secured = connector.connect(name, connection).await;
    let secured = secured.map_err(|error| format!("TLS with {host}:{port} failed: {error}"))?;
    exchange(secured, uri, &host, limit).await
}

fn trust(certificates: &Path) -> Result<rustls::ClientConfig, String> {
    let mut roots = rustls::RootCertStore::empty();
    let pem = CertificateDer::pem_file_iter(certificates);
    let pem = pem.map_err(|error| format!("cannot read {}: {error}", certificates.display()))?;
    roots.add_parsable_certificates(pem.flatten());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| error.to_string())?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

async fn exchange<S>(stream: S, uri: &Uri, host: &str, limit: usize) -> Result<Reply, String>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let text = |error: hyper::Error| error.to_string();
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(text)?;
    let path = uri.path_and_query().map_or("/", |p| p.as_str());
    let authority = uri.port_u16().map_or(host.to_owned(), |port| format!("{host}:{port}"));
    let request = http::Request::get(path)
        .header("host", authority)
        .header("user-agent", concat!("atoll-hostd/", env!("CARGO_PKG_VERSION")))
        .header("accept", "application/yaml, text/plain, */*")
        .body(Empty::<Bytes>::new())
        .map_err(|error| error.to_string())?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(text)?;
        let status = response.status();
        if status.is_redirection()
            && let Some(location) = response.headers().get("location").and_then(|l| l.to_str().ok())
        {
            return Ok(Reply::Elsewhere(location.to_owned()));
        }
        if status != http::StatusCode::OK {
            return Err(format!("the server answers {status}"));
        }
        let body = Limited::new(response.into_body(), limit).collect().await;
        let body =
            body.map_err(|error| format!("the answer broke off or has more than {limit} bytes: {error}"))?;
        Ok(Reply::Content(body.to_bytes().to_vec()))
    };
    // The connection has to be driven while the answer is awaited; it ends with this function.
    let mut connection = std::pin::pin!(connection);
    let mut answer = std::pin::pin!(answer);
    // Cancel-safe: both futures are pinned outside and polled on.
    tokio::select! {
        reply = &mut answer => reply,
        ended = &mut connection => match ended {
            Ok(()) => answer.await,
            Err(error) => Err(text(error)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn serve(answer: &'static [u8]) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://user:secret@{}/machine.yaml?key=secret", listener.local_addr().unwrap());
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 1024]).await.unwrap();
            stream.write_all(answer).await.unwrap();
        });
        url
    }

    async fn fetch(answer: &'static [u8]) -> Result<Vec<u8>, String> {
        let url = serve(answer).await;
        get(&url, Path::new("/none"), 64).await.map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn content_is_fetched_and_bounded() {
        assert_eq!(fetch(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap(), b"ok");
        let long = fetch(b"HTTP/1.1 200 OK\r\ncontent-length: 65\r\n\r\n..........................................................\
                           .......").await.unwrap_err();
        assert!(long.contains("more than 64 bytes"), "{long}");
        let missing = fetch(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n").await.unwrap_err();
        assert!(
            missing.contains("404") && missing.contains("/machine.yaml") && !missing.contains("secret"),
            "{missing}"
        );
        let cut = fetch(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok").await.unwrap_err();
        assert!(cut.contains("broke off"), "{cut}");
    }

    #[tokio::test]
    async fn a_redirect_from_https_to_http_is_refused() {
        let from: Uri = "https://a/b".parse().unwrap();
        assert!(follow(&from, "http://a/b").is_err());
        assert!(follow(&from, "https://c/d").is_ok());
        assert!(follow(&from, "/d").is_err());
    }

    /// One answer over TLS, by a server whose certificate is in the returned PEM file.
    async fn serve_tls(name: &str, directory: &Path) -> (u16, std::path::PathBuf) {
        let made = rcgen::generate_simple_self_signed(vec![name.to_owned()]).unwrap();
        let pem = directory.join(format!("{name}.pem"));
        std::fs::write(&pem, made.cert.pem()).unwrap();
        let key = rustls_pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            // A client that does not trust the certificate breaks off here.
            let Ok(mut stream) = acceptor.accept(stream).await else { return };
            let _ = stream.read(&mut [0; 1024]).await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
            let _ = stream.shutdown().await;
        });
        (port, pem)
    }

    #[tokio::test]
    async fn https_needs_a_certificate_that_is_trusted() {
        let directory = tempfile::tempdir().unwrap();
        let (port, trusted) = serve_tls("localhost", directory.path()).await;
        let got = get(&format!("https://localhost:{port}/a"), &trusted, 64).await.unwrap();
        assert_eq!(got, b"ok");
        let (_, other) = serve_tls("other", directory.path()).await;
        let (port, _) = serve_tls("localhost", directory.path()).await;
        let refused = get(&format!("https://localhost:{port}/a"), &other, 64).await.unwrap_err().to_string();
        assert!(refused.contains("TLS with localhost") && refused.contains("ertificate"), "{refused}");
        let missing =
            get(&format!("https://localhost:{port}/a"), Path::new("/none.pem"), 64).await.unwrap_err();
        assert!(missing.to_string().contains("/none.pem"), "{missing}");
    }
}
