//! A GET for probes and hooks. Over TLS the certificate is not checked, as the API says: a probe asks whether the
//! container answers, not who it is.

use crate::exchange::{Body, Proof, any_certificate, exchange};
use http::header::{ACCEPT, CONNECTION, HOST, HeaderName, USER_AGENT};
use http_body_util::Full;
use rustls_pki_types::ServerName;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

const AGENT: &str = "kube-probe/1.37";

/// What to ask for.
pub struct Request<'a> {
    /// Over TLS.
    pub tls: bool,
    /// Address or name.
    pub host: &'a str,
    /// Port.
    pub port: u16,
    /// Path and query.
    pub path: &'a str,
    /// Extra headers; they win over ours.
    pub headers: &'a [(String, String)],
}

impl Request<'_> {
    /// As text.
    pub fn url(&self) -> String {
        let scheme = if self.tls { "https" } else { "http" };
        format!("{scheme}://{}:{}{}", self.host, self.port, self.path)
    }

    /// Sends it; answers the status code. The caller sets the deadline.
    pub async fn send(&self) -> Result<u16, String> {
        let stream = TcpStream::connect((self.host, self.port)).await.map_err(|e| e.to_string())?;
        if !self.tls {
            return self.exchange(stream).await;
        }
        let name = ServerName::try_from(self.host.to_owned()).map_err(|e| e.to_string())?;
        let config = any_certificate(Proof::Nothing).map_err(|e| e.to_string())?;
        let connector = TlsConnector::from(Arc::new(config));
        let stream = connector.connect(name, stream).await.map_err(|e| e.to_string())?;
        self.exchange(stream).await
    }

    async fn exchange(
        &self,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    ) -> Result<u16, String> {
        let mut request = http::Request::get(self.path).body(Full::default()).map_err(|e| e.to_string())?;
        let headers = request.headers_mut();
        let authority = format!("{}:{}", self.host, self.port);
        let ours = [(HOST, authority.as_str()), (USER_AGENT, AGENT), (ACCEPT, "*/*"), (CONNECTION, "close")];
        let theirs =
            self.headers.iter().filter_map(|(n, v)| Some((HeaderName::try_from(n).ok()?, v.as_str())));
        for (name, value) in ours.into_iter().chain(theirs) {
            headers.insert(name, value.parse().map_err(|_| format!("header value '{value}' is not one"))?);
        }
        let answer = exchange(stream, request, Body::Ignored).await.map_err(|e| e.to_string())?;
        Ok(answer.status.as_u16())
    }
}

/// A server on this machine that answers so many requests with this status.
#[cfg(test)]
pub async fn answering(status: &'static str, times: usize) -> (u16, tokio::task::JoinHandle<Vec<String>>) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = tokio::spawn(async move {
        let mut seen = Vec::new();
        for _ in 0..times {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut buffer = vec![0; 1024];
            let read = stream.read(&mut buffer).await.unwrap();
            stream.write_all(format!("HTTP/1.1 {status}\r\n\r\n").as_bytes()).await.unwrap();
            seen.push(String::from_utf8(buffer[..read].to_vec()).unwrap());
        }
        seen
    });
    (port, server)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn asks_and_reads_the_status() {
        let (port, server) = answering("204 No Content", 1).await;
        let headers = [("Host".to_owned(), "web.example".to_owned())];
        let request =
            Request { tls: false, host: "127.0.0.1", port, path: "/healthz?x=1", headers: &headers };
        assert_eq!(request.send().await, Ok(204));
        let seen = server.await.unwrap()[0].to_lowercase();
        assert!(seen.starts_with("get /healthz?x=1 http/1.1"), "{seen}");
        assert!(seen.contains("host: web.example") && seen.contains("user-agent: kube-probe/"), "{seen}");
    }
}
