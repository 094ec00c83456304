//! The gRPC health check, `grpc.health.v1.Health/Check`.

use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Endpoint;
use tonic_prost::ProstCodec;

#[derive(Clone, PartialEq, prost::Message)]
struct HealthRequest {
    #[prost(string, tag = "1")]
    service: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct HealthResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

const SERVING: i32 = 1;

/// Asks once; the caller sets the deadline.
///
/// # Errors
/// Why the service does not serve.
pub async fn check(host: &str, port: u16, service: &str) -> Result<(), String> {
    let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    let endpoint = Endpoint::from_shared(format!("http://{host}:{port}")).map_err(|e| e.to_string())?;
    let channel = endpoint
        .connect()
        .await
        .map_err(|e| format!("cannot connect to port {port}: {}", crate::error::chain(&e)))?;
    let mut client = Grpc::new(channel);
    client.ready().await.map_err(|e| e.to_string())?;
    let request = tonic::Request::new(HealthRequest { service: service.to_owned() });
    let path = PathAndQuery::from_static("/grpc.health.v1.Health/Check");
    let codec: ProstCodec<HealthRequest, HealthResponse> = ProstCodec::default();
    let answer =
        client.unary(request, path, codec).await.map_err(|e| format!("health check: {}", e.message()))?;
    let status = answer.into_inner().status;
    if status == SERVING { Ok(()) } else { Err(format!("service unhealthy (responded with {status})")) }
}
