//! Port forwarding: connections from a client to ports of a pod.
//!
//! The pod's network namespace is its VM, so the host dials the pod's address. Called by `server`. Invariant: a
//! connection that fails is told on its own error stream and leaves the others alone.

use super::{spdy, websocket};
use crate::error::{Error, Result, within};
use crate::service::{Command, Service};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// Time to connect to the pod.
const DIAL_DEADLINE: Duration = Duration::from_secs(15);
/// Time between the two streams of one connection.
const PAIR_DEADLINE: Duration = Duration::from_secs(30);

async fn dial(service: &Service, sandbox: &str, port: u16) -> Result<TcpStream> {
    let id = sandbox.to_owned();
    let address: Ipv4Addr = service.ask(|reply| Command::UseSandbox(id, reply)).await?.address;
    let object = format!("port {port} of pod {address}");
    let what = || format!("connecting to {object}");
    within(DIAL_DEADLINE, what, TcpStream::connect((address, port)))
        .await?
        .map_err(Error::os("connect to", &object))
}

/// Copies both ways until the pod has closed its side; `send` answers `false` when the client is gone.
async fn copy(
    pod: TcpStream,
    mut from_client: mpsc::Receiver<Bytes>,
    send: impl Fn(Bytes) -> BoxFuture<'static, bool> + Send,
) -> std::io::Result<()> {
    let (mut read, mut write) = pod.into_split();
    let upstream = async {
        while let Some(data) = from_client.recv().await {
            write.write_all(&data).await?;
        }
        write.shutdown().await
    };
    let downstream = async {
        loop {
            let mut buffer = bytes::BytesMut::with_capacity(32 << 10);
            if read.read_buf(&mut buffer).await? == 0 || !send(buffer.freeze()).await {
                return Ok(());
            }
        }
    };
    tokio::pin!(upstream, downstream);
    // When the client has sent all, the pod may still answer; when the pod has, nothing is left to do.
    tokio::select! {
        result = &mut downstream => result,
        result = &mut upstream => match result {
            Ok(()) => downstream.await,
            Err(error) => Err(error),
        },
    }
}

#[derive(Default)]
struct Pair {
    data: Option<spdy::Incoming>,
    error: Option<spdy::Incoming>,
}

/// Serves a SPDY connection: each pair of streams (data, error) of one request id is one connection to the pod.
pub async fn over_spdy(service: Service, sandbox: String, mut connection: spdy::Connection) {
    let mut pairs: HashMap<String, (Pair, tokio::time::Instant)> = HashMap::new();
    // Ends what still runs when the client is gone.
    let mut running = JoinSet::new();
    while let Some(incoming) = connection.incoming.recv().await {
        while running.try_join_next().is_some() {}
        pairs.retain(|_, (_, since)| since.elapsed() < PAIR_DEADLINE);
        let is_error = match incoming.header("streamtype") {
            Some("error") => true,
            Some("data") => false,
            _ => {
                connection.writer.reset(incoming.stream).await;
                continue;
            }
        };
        let request = request_id(&incoming, is_error);
        let (pair, _) =
            pairs.entry(request.clone()).or_insert_with(|| (Pair::default(), tokio::time::Instant::now()));
        let slot = if is_error { &mut pair.error } else { &mut pair.data };
        *slot = Some(incoming);
        if let (Some(_), Some(_)) = (&pair.data, &pair.error)
            && let Some((Pair { data: Some(data), error: Some(error) }, _)) = pairs.remove(&request)
        {
            running.spawn(one_pair(service.clone(), sandbox.clone(), connection.writer.clone(), data, error));
        }
    }
}

/// The request that a stream belongs to; clients that do not say number their streams in pairs.
fn request_id(incoming: &spdy::Incoming, is_error: bool) -> String {
    match incoming.header("requestid") {
        Some(id) if !id.is_empty() => id.to_owned(),
        _ => (if is_error { incoming.stream } else { incoming.stream.saturating_sub(2) }).to_string(),
    }
}

async fn one_pair(
    service: Service,
    sandbox: String,
    writer: spdy::Writer,
    data: spdy::Incoming,
    error: spdy::Incoming,
) {
    let header = data.header("port").unwrap_or_default().to_owned();
    let (data_stream, error_stream) = (data.stream, error.stream);
    let forward = async {
        let port = header.parse::<u16>().ok().filter(|p| *p > 0);
        let port = port.ok_or_else(|| Error::Invalid(format!("'{header}' is not a port")))?;
        let pod = dial(&service, &sandbox, port).await?;
        let to_client = writer.clone();
        let send = move |bytes| -> BoxFuture<'static, bool> {
            let writer = to_client.clone();
            Box::pin(async move { writer.data(data_stream, bytes).await })
        };
        copy(pod, data.data, send).await.map_err(Error::os("forward", &format!("port {port}")))
    };
    match forward.await {
        Ok(()) => {
            writer.end(data_stream).await;
            writer.end(error_stream).await;
        }
        Err(why) => {
            let text = format!("error forwarding port {header} to pod {sandbox}: {why}");
            writer.data(error_stream, text.into()).await;
            writer.end(error_stream).await;
            writer.reset(data_stream).await;
        }
    }
}

/// Serves a WebSocket: two channels per port, data and error, each opened by the port's number.
pub async fn over_websocket(service: Service, sandbox: String, ports: Vec<u16>, socket: websocket::Socket) {
    let (mut sender, mut receiver) = socket.split();
    let (out, mut outgoing) = mpsc::channel::<(u8, Bytes)>(64);
    let mut inputs = Vec::new();
    let mut running = JoinSet::new();
    for (n, port) in ports.into_iter().take(64).enumerate() {
        let (input, from_client) = mpsc::channel(64);
        inputs.push(input);
        running.spawn(one_port(
            service.clone(),
            sandbox.clone(),
            port,
            n as u8 * 2,
            from_client,
            out.clone(),
        ));
    }
    drop(out);
    let receive = async {
        while let Some(received) = receiver.next().await {
            if let websocket::Received::Data(channel, data) = received
                && channel.is_multiple_of(2)
                && let Some(input) = inputs.get(usize::from(channel / 2))
            {
                let _ = input.send(data).await; // that connection may have ended
            }
        }
    };
    let send = async {
        while let Some((channel, data)) = outgoing.recv().await {
            if sender.send(channel, &data).await.is_err() {
                return;
            }
        }
        sender.close().await;
    };
    // The client's end ends all; the end of all connections closes the socket.
    tokio::select! { () = receive => {}, () = send => {} }
}

async fn one_port(
    service: Service,
    sandbox: String,
    port: u16,
    channel: u8,
    from_client: mpsc::Receiver<Bytes>,
    out: mpsc::Sender<(u8, Bytes)>,
) {
    let number = Bytes::from(port.to_le_bytes().to_vec());
    for channel in [channel, channel + 1] {
        if out.send((channel, number.clone())).await.is_err() {
            return;
        }
    }
    let forward = async {
        let pod = dial(&service, &sandbox, port).await?;
        let to_client = out.clone();
        let send = move |bytes| -> BoxFuture<'static, bool> {
            let out = to_client.clone();
            Box::pin(async move { out.send((channel, bytes)).await.is_ok() })
        };
        copy(pod, from_client, send).await.map_err(Error::os("forward", &format!("port {port}")))
    };
    if let Err(why) = forward.await {
        let text = format!("error forwarding port {port} to pod {sandbox}: {why}");
        let _ = out.send((channel + 1, text.into())).await; // the client may have gone
    }
}
